"use strict";
// The Tokens tab: filters, the list of responses, one response as coloured tokens, its line chart, one token's numbers.

const FRACTIONS = [-1, -0.5, -0.25, -0.0625, 0.0625, 0.25, 0.5, 1]; // of a colour's limit; charts/heat_map.py has the same
const MOST_ROWS = 200;
const MOST_POINTS = 2000; // of the line chart
const CUTS = [
  "no bound",
  "weight held at the lower bound",
  "weight held at the upper bound",
  "gradient 0: ratio below the lower bound",
  "gradient 0: ratio above the upper bound",
  "gradient 0: dropped by the objective's filter",
  "gradient 0: ratio beyond exp(20)",
];
const CUT_NOT_TOLD = 255;

// What tokens can be coloured by. value: what is shown; colour: what the scale takes, in nats for ratios.
const QUANTITIES = {
  ratio: { label: "ratio", unit: "trained / behaviour policy", log: true, value: (r, i) => Math.exp(r.logRatio[i]), colour: (r, i) => r.logRatio[i] },
  prefix_min: { label: "prefix minimum", unit: "ratio", log: true, value: (r, i) => Math.exp(r.prefixMin[i]), colour: (r, i) => r.prefixMin[i] },
  weight: { label: "weight", unit: "of the policy gradient", log: true, value: (r, i) => r.weights[i], colour: (r, i) => Math.log(Math.abs(r.weights[i])) },
  pull: { label: "advantage × weight", unit: "push on the log-prob", log: false, value: (r, i) => r.advantage * r.weights[i], colour: (r, i) => r.advantage * r.weights[i] },
  mismatch: { label: "trainer − server", unit: "nats", log: false, value: (r, i) => r.behaviour[i] - r.engine[i], colour: (r, i) => r.behaviour[i] - r.engine[i] },
  entropy: { label: "entropy", unit: "nats", log: false, value: (r, i) => r.entropy[i], colour: (r, i) => r.entropy[i] },
};

/** Open the views of a panel that are visible and not open yet. */
function openTokenViews(root) {
  for (const place of root.querySelectorAll(".token-view:empty")) {
    if (place.offsetParent === null) continue;
    place.append(document.getElementById("token-view").content.cloneNode(true));
    new TokenView(place, page.runs[Number(place.dataset.run)].tokens);
  }
}

/** The response's arrays, unpacked once. Trained tokens count from 0; `places` says where they stand among all tokens. */
function unpackResponse(packed, tokens) {
  const behaviour = unpack(packed.behaviour_logprobs, Float32Array);
  const logprobs = unpack(packed.logprobs, Float32Array);
  const trained = behaviour.length;
  const response = {
    ...packed,
    behaviour,
    logprobs,
    trained,
    pieces: unpack(packed.pieces, tokens.wide ? Uint32Array : Uint16Array),
    engine: packed.engine === null ? behaviour : unpack(packed.engine, Float32Array),
    cumulative: unpack(packed.cumulative, Float32Array),
    weights: unpack(packed.weights, Float32Array),
    entropy: unpack(packed.entropy, Float32Array),
    cut: packed.cut === null ? new Uint8Array(trained) : unpack(packed.cut, Uint8Array),
    prefixMin: new Float64Array(trained),
    logRatio: Float64Array.from(logprobs, (value, i) => value - behaviour[i]),
    setBy: new Int32Array(trained).fill(-1), // the earlier token with the smallest ratio
    places: [],
  };
  packed.prefix_min.forEach(([start, value], n) => response.prefixMin.fill(value ?? NaN, start, packed.prefix_min[n + 1]?.[0]));
  for (let i = 1; i < trained; i++) {
    const before = response.setBy[i - 1];
    response.setBy[i] = before >= 0 && response.logRatio[before] <= response.logRatio[i - 1] ? before : i - 1;
  }
  let place = 0;
  packed.mask.forEach((length, stretch) => {
    for (let end = place + length; place < end; place++) if (stretch % 2) response.places.push(place);
  });
  return response;
}

/** Places of the smallest and the largest value in each of MOST_POINTS / 2 stretches, so that a long line keeps its shape; all of a short one. */
function extremes(values) {
  if (values.length <= MOST_POINTS) return values.map((_, i) => i);
  const kept = new Set([0, values.length - 1]);
  const stretch = (2 * values.length) / MOST_POINTS;
  for (let begin = 0; begin < values.length; begin += stretch) {
    const places = [];
    for (let i = Math.floor(begin); i < Math.min(values.length, Math.floor(begin + stretch)); i++) places.push(i);
    kept.add(places.reduce((low, i) => (values[i] < values[low] ? i : low), places[0]));
    kept.add(places.reduce((high, i) => (values[i] > values[high] ? i : high), places[0]));
  }
  kept.delete(undefined);
  return [...kept].sort((a, b) => a - b);
}

/** 0 to 8: which of the nine colours. */
function colourOf(value, limit) {
  if (Number.isNaN(value)) return 4;
  return FRACTIONS.filter((fraction) => value > fraction * limit).length;
}

class TokenView {
  constructor(root, tokens) {
    this.root = root;
    this.tokens = tokens;
    this.find = (selector) => root.querySelector(selector);
    this.quantity = "ratio";
    this.at = -1;
    this.offerFilters();
    this.offerColours();
    this.listenToTokens();
    this.find(".previous").addEventListener("click", () => this.move(-1));
    this.find(".next").addEventListener("click", () => this.move(1));
    this.applyFilters();
  }

  file(response) {
    return this.tokens.files[response.file];
  }

  title(response) {
    const file = this.file(response);
    return `step ${file.step}, group ${response.group}, response ${response.number}`;
  }

  offerFilters() {
    const unique = (values) => [...new Set(values)].sort((a, b) => a - b);
    const options = (name, values) => {
      this.find(`[data-filter=${name}]`).replaceChildren(new Option("all", ""), ...values.map((value) => new Option(value, value)));
    };
    options("step", unique(this.tokens.files.map((file) => file.step)));
    options("group", unique(this.tokens.responses.map((response) => response.group)));
    for (const control of this.root.querySelectorAll("[data-filter]")) control.addEventListener("input", () => this.applyFilters());
  }

  applyFilters() {
    const chosen = Object.fromEntries([...this.root.querySelectorAll("[data-filter]")].map((control) => [control.dataset.filter, control.value]));
    const rewards = {
      correct: (response) => response.correct,
      wrong: (response) => !response.correct,
      positive: (response) => response.reward > 0,
    };
    const cuts = {
      zeroed: (response) => response.zeroed > 0,
      held: (response) => response.held > 0,
      none: (response) => response.zeroed + response.held === 0,
    };
    const found = this.tokens.responses.filter(
      (response) =>
        (chosen.step === "" || this.file(response).step === Number(chosen.step)) &&
        (chosen.group === "" || response.group === Number(chosen.group)) &&
        (chosen.reward === "" || rewards[chosen.reward](response)) &&
        (chosen.cut === "" || cuts[chosen.cut](response)) &&
        (chosen.finish === "" || (response.finish === "length") === (chosen.finish === "truncated")) &&
        (chosen.lowest === "" || (response.lowest !== null && response.lowest < Math.log(Number(chosen.lowest)))),
    );
    const orders = {
      lowest: (a, b) => a.lowest - b.lowest,
      cut: (a, b) => b.zeroed + b.held - a.zeroed - a.held,
      length: (a, b) => b.trained - a.trained,
    };
    if (orders[chosen.order]) found.sort(orders[chosen.order]);
    this.found = found;
    this.listResponses();
    this.find(".response").hidden = found.length === 0;
    if (found.length) this.open(0);
  }

  listResponses() {
    const shown = this.found.slice(0, MOST_ROWS);
    const more = this.found.length > shown.length ? `; the first ${shown.length} are listed` : "";
    this.find(".found").textContent = `${this.found.length} of ${this.tokens.responses.length} recorded responses${more}`;
    this.find("tbody").replaceChildren(
      ...shown.map((response, place) => {
        const row = make("tr");
        const head = make("td");
        const button = make("button", "link", this.title(response));
        button.addEventListener("click", () => this.open(place));
        row.addEventListener("click", () => this.open(place));
        head.append(button);
        const numbers = [response.reward, response.advantage, response.trained, response.lowest === null ? null : Math.exp(response.lowest), response.held, response.zeroed];
        const end = response.finish === "length" ? "truncated" : response.finish;
        row.append(head, ...numbers.map((value) => make("td", "number", digits(value, 3))), make("td", "", end));
        return row;
      }),
    );
  }

  move(by) {
    this.open((this.opened + by + this.found.length) % this.found.length);
  }

  open(place) {
    this.opened = place;
    const packed = this.found[place];
    this.response = unpackResponse(packed, this.tokens);
    this.at = -1;
    [...this.find("tbody").rows].forEach((row, n) => row.classList.toggle("chosen", n === place));
    this.find(".response-head h3").textContent = this.title(packed);
    this.find(".about").replaceChildren(...this.about(packed));
    this.writeTokens();
    this.colour();
    this.showNumbers();
  }

  about(response) {
    const file = this.file(response);
    const spans = response.spans.map(([version]) => version);
    const sampledBy = new Set(spans).size > 1 ? `policies ${Math.min(...spans)} to ${Math.max(...spans)}` : `policy ${file.sampled_version}`;
    const facts = [
      ["reward", digits(response.reward)],
      ["advantage", digits(response.advantage)],
      ["sampled", `in step ${file.sampled_step} by ${sampledBy}`],
      ["trained", `mini-batch ${file.update}, policy ${file.version}, lag ${file.lag} updates`],
      ["objective", file.objective],
      ["label", response.answer],
      ["answer", response.extracted],
      ["grading failed", response.error],
    ];
    return facts
      .filter(([, value]) => value !== undefined)
      .map(([name, value]) => {
        const fact = make("span", "fact");
        fact.append(make("span", "quiet", `${name} `), make("bdi", "", value));
        return fact;
      });
  }

  writeTokens() {
    const { response } = this;
    const trainedAt = new Map(response.places.map((place, i) => [place, i]));
    this.spans = new Array(response.trained);
    const nodes = [];
    response.pieces.forEach((piece, place) => {
      const [, text, special] = this.tokens.pieces[piece];
      const i = trainedAt.get(place);
      const span = make("span", `token${special ? " special" : ""}${i === undefined ? " given" : ""}`);
      span.textContent = text === null ? "" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
      if (span.textContent === "") span.classList.add("part-of-character");
      if (i !== undefined) {
        span.dataset.i = i;
        span.dataset.kind = span.className;
        span.tabIndex = -1;
        span.setAttribute("role", "button");
        this.spans[i] = span;
      }
      nodes.push(span);
      if (text?.includes("\n")) nodes.push(make("br"));
    });
    this.find(".text").replaceChildren(...nodes);
    if (this.spans.length) this.spans[0].tabIndex = 0;
  }

  listenToTokens() {
    const text = this.find(".text");
    const tokenOf = (event) => event.target.closest?.("[data-i]");
    for (const kind of ["pointerover", "focusin", "click"]) {
      text.addEventListener(kind, (event) => tokenOf(event) && this.look(Number(tokenOf(event).dataset.i)));
    }
    text.addEventListener("keydown", (event) => {
      const last = this.response.trained - 1;
      const minimum = this.response.setBy[this.at];
      const to = { ArrowRight: this.at + 1, ArrowLeft: this.at - 1, Home: 0, End: last, m: minimum, M: minimum }[event.key];
      if (to === undefined || to < 0 || to > last) return;
      event.preventDefault();
      this.spans[to].focus();
    });
  }

  /** Look at trained token i: its numbers, the token that set its minimum, its place in the chart. */
  look(i) {
    if (i === this.at) return;
    this.find(".text .looked-at")?.classList.remove("looked-at");
    this.find(".text .set-minimum")?.classList.remove("set-minimum");
    this.find(".text [tabindex='0']")?.setAttribute("tabindex", "-1");
    this.at = i;
    this.spans[i].tabIndex = 0;
    const quantity = QUANTITIES[this.quantity];
    this.spans[i].setAttribute("aria-label", `${this.spans[i].textContent} ${quantity.label} ${digits(quantity.value(this.response, i), 3)}`);
    this.markTokens(i);
    this.showNumbers();
    this.markInChart();
  }

  /** Outline token i and the one that set its minimum. */
  markTokens(i) {
    this.spans[i].classList.add("looked-at");
    if (this.minimumSetter(i) >= 0) this.spans[this.minimumSetter(i)].classList.add("set-minimum");
  }

  /** A line and a dot where the token that is looked at stands in the chart. */
  markInChart() {
    const marker = this.find(".marker");
    if (!marker || !this.chart) return;
    marker.hidden = this.at < 0;
    if (this.at < 0) return;
    const { log, value } = QUANTITIES[this.quantity];
    const y = value(this.response, this.at);
    const [left, top] = this.chart.origin();
    marker.style.left = `${left + this.chart.scale("x")(this.at + 1)}px`;
    marker.style.setProperty("--dot", `${top + (log && !(y > 0) ? -99 : this.chart.scale("y")(y))}px`);
  }

  /** The token that set the minimum of token i; -1 where there is none or the record says another value. */
  minimumSetter(i) {
    const { setBy, logRatio, prefixMin } = this.response;
    return setBy[i] >= 0 && Math.abs(logRatio[setBy[i]] - prefixMin[i]) < 1e-5 + 1e-4 * Math.abs(prefixMin[i]) ? setBy[i] : -1;
  }

  pieceOf(i) {
    return this.tokens.pieces[this.response.pieces[this.response.places[i]]];
  }

  showNumbers() {
    const box = this.find(".numbers");
    const { response: r, at: i } = this;
    if (i < 0) {
      box.replaceChildren(make("p", "quiet", "Point at a token, tap it, or reach it with Tab and the arrow keys."));
      return;
    }
    const [id, text, special] = this.pieceOf(i);
    const head = make("p", "token-name");
    head.append(make("bdi", "shown-token", text === null ? "first bytes of the next character" : text), make("span", "quiet", `id ${id}${special ? ", special" : ""}`));
    const rows = [
      ["place", `${i + 1} of ${r.trained}`],
      ["log-prob, server", digits(r.engine[i])],
      ["log-prob, behaviour", digits(r.behaviour[i])],
      ["log-prob, trained", digits(r.logprobs[i])],
      ["ratio", digits(Math.exp(r.logRatio[i])), digits(r.logRatio[i])],
      ["prefix minimum", digits(Math.exp(r.prefixMin[i])), digits(r.prefixMin[i])],
      ["product of ratios", digits(Math.exp(r.cumulative[i])), digits(r.cumulative[i])],
      ["weight", digits(r.weights[i])],
      ["advantage × weight", digits(r.advantage * r.weights[i])],
      ["entropy (nats)", digits(r.entropy[i])],
    ];
    const table = make("table", "plain");
    const body = make("tbody");
    for (const [name, value, log] of rows) {
      const row = make("tr");
      row.dataset.number = name;
      const head = make("th", "", name);
      head.scope = "row";
      row.append(head, make("td", "number quiet", log === undefined ? "" : `log ${log}`), make("td", "number", value));
      body.append(row);
    }
    table.append(body);
    box.replaceChildren(head, table, this.minimumLine(i), make("p", r.cut[i] ? "cut-line" : "cut-line quiet", CUTS[r.cut[i]] ?? "the objective does not say what cut it"));
  }

  minimumLine(i) {
    const setter = this.minimumSetter(i);
    const line = make("p", "minimum-line");
    if (setter < 0) {
      line.append(make("span", "quiet", i === 0 ? "No token before it." : "The record does not say which token set the minimum."));
      return line;
    }
    const button = make("button", "link");
    button.append("minimum set by token ", make("b", "", setter + 1), " ", make("bdi", "shown-token", this.pieceOf(setter)[1] ?? ""));
    button.addEventListener("click", () => {
      this.spans[setter].focus();
      this.spans[setter].scrollIntoView({ block: "nearest" });
    });
    line.append(button);
    return line;
  }

  offerColours() {
    const group = this.find(".colour-choice");
    const keys = Object.keys(QUANTITIES);
    group.replaceChildren(
      ...keys.map((key) => {
        const button = make("button", "", QUANTITIES[key].label);
        button.setAttribute("role", "radio");
        button.dataset.quantity = key;
        button.addEventListener("click", () => this.choose(key));
        button.addEventListener("keydown", (event) => {
          const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
          if (by === undefined) return;
          event.preventDefault();
          const next = keys[(keys.indexOf(key) + by + keys.length) % keys.length];
          this.choose(next);
          group.querySelector(`[data-quantity=${next}]`).focus();
        });
        return button;
      }),
    );
  }

  choose(key) {
    this.quantity = key;
    this.colour();
  }

  colour() {
    const quantity = QUANTITIES[this.quantity];
    const limit = this.tokens.limits[this.quantity];
    for (const button of this.root.querySelectorAll("[data-quantity]")) {
      const chosen = button.dataset.quantity === this.quantity;
      button.setAttribute("aria-checked", String(chosen));
      button.tabIndex = chosen ? 0 : -1;
    }
    this.spans.forEach((span, i) => {
      const cut = this.response.cut[i];
      span.className = `${span.dataset.kind} shade-${colourOf(quantity.colour(this.response, i), limit)}${cut in CUTS && cut ? ` cut-${cut}` : ""}`;
    });
    if (this.at >= 0) this.markTokens(this.at);
    this.writeLegend(quantity, limit);
    this.drawChart(quantity);
  }

  writeLegend(quantity, limit) {
    const scale = make("div", "scale");
    const bounds = FRACTIONS.map((fraction) => digits(quantity.log ? Math.exp(fraction * limit) : fraction * limit, 3));
    for (let shade = 0; shade <= FRACTIONS.length; shade++) {
      const step = make("span", `swatch shade-${shade}`);
      if (shade > 0) step.append(make("span", "bound", bounds[shade - 1]));
      scale.append(step);
    }
    const marks = make("div", "marks");
    for (const [className, text] of [
      ["cut-1", "weight held at a bound"],
      ["cut-4", "gradient 0"],
      ["set-minimum", "set the minimum"],
      ["given", "prompt, not trained"],
      ["special", "special token"],
    ]) {
      const mark = make("span", "mark");
      mark.append(make("span", `token ${className}`, "token"), make("span", "quiet", text));
      marks.append(mark);
    }
    this.find(".legend").replaceChildren(make("span", "legend-title", quantity.unit), scale, marks);
  }

  async drawChart(quantity) {
    const { response: r } = this;
    const figure = this.find(".token-chart");
    figure.querySelector("h3").textContent = quantity.label[0].toUpperCase() + quantity.label.slice(1);
    figure.querySelector(".unit").textContent =
      `${quantity.unit}${this.quantity === "ratio" ? "; dashed: prefix minimum" : ""}; dots: weight held, crosses: gradient 0${r.trained > MOST_POINTS ? "; lowest and highest of each stretch" : ""}`;
    const plot = figure.querySelector(".plot");
    plot.setAttribute("aria-label", `${quantity.label} of each trained token`);
    const values = Array.from(r.cut, (_, i) => quantity.value(r, i));
    const rows = extremes(values).map((i) => {
      const cut = r.cut[i] === CUT_NOT_TOLD ? 0 : r.cut[i];
      const value = values[i];
      const y = quantity.log && !(value > 0) ? null : value;
      return { place: i + 1, y, cut, below: this.quantity === "ratio" ? Math.exp(r.prefixMin[i]) : null };
    });
    const order = (this.drawings = (this.drawings ?? 0) + 1);
    this.chart = null;
    const has = { below: this.quantity === "ratio", cut: rows.some((row) => row.cut > 0) };
    const spec = quantity.log ? page.specs.tokens_log : page.specs.tokens_linear;
    const inSteps = (layer) => (layer.name === "value" && this.quantity === "prefix_min" ? { ...layer, mark: { ...layer.mark, interpolate: "step-before" } } : layer);
    const layer = spec.layer.filter((one) => has[one.name] ?? true).map(inSteps);
    const view = await embed(plot, { ...spec, layer }, { tokens: rows }, rows.length);
    if (order !== this.drawings) return; // another one was asked for meanwhile
    this.chart = view;
    plot.append(make("i", "marker"));
    this.markInChart();
    view.addEventListener("pointermove", (event) => {
      const x = event.clientX - plot.querySelector("svg").getBoundingClientRect().left - view.origin()[0];
      const i = Math.round(view.scale("x").invert(x)) - 1;
      if (i >= 0 && i < r.trained) this.look(i);
    });
  }
}
