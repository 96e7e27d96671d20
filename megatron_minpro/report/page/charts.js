"use strict";
// Draws a chart when its place is shown for the first time.

const rowsOfRun = new Map();
const viewsAlong = new Map(); // the place of a chart along the response -> its view

/** One row a step, from the run's columns. */
function stepRows(run) {
  if (!rowsOfRun.has(run)) {
    const columns = page.runs[run].columns;
    const names = Object.keys(columns);
    rowsOfRun.set(run, columns.global_step.map((_, place) => Object.fromEntries(names.map((name) => [name, columns[name][place]]))));
  }
  return rowsOfRun.get(run);
}

/** One row a stretch of the response, at the step that the slider of the charts along the response shows. */
function rowsAlong(figure) {
  const { places, values } = page.runs[figure.dataset.run].along.charts[figure.dataset.chart];
  const bands = values[figure.closest(".along").querySelector(".step-choice").value];
  return places.flatMap((place, index) => {
    if (!bands[index]) return [];
    const [low, middle, high] = bands[index];
    return [{ place, low, middle, high }];
  });
}

/** Draw a chart along the response again, if it is drawn. */
async function showStep(figure) {
  await viewsAlong.get(figure)?.data("along", rowsAlong(figure)).runAsync();
}

/** Draw the charts along the response again when the slider moves. */
function followStep(slider) {
  slider.addEventListener("input", () => {
    const along = slider.closest(".along");
    along.querySelector(".shown-step").textContent = page.runs[along.dataset.run].along.steps[slider.value];
    along.querySelectorAll("figure").forEach(showStep);
  });
}

/** The datasets of the charts of several runs. */
function severalRows() {
  const runs = page.several.runs.flatMap((place, run) => stepRows(run).map((row) => ({ ...row, ...place })));
  return { runs, groups: page.several.groups };
}

/** Put a specification with its datasets into an element. Resolves to Vega's view. */
async function embed(element, spec, datasets, count) {
  const params = spec.params?.map((param) => (param.name === "count" ? { ...param, value: count } : param));
  const options = {
    mode: "vega-lite",
    renderer: "svg",
    actions: false,
    ast: true, // expressions are interpreted, so that the page needs no eval
    defaultStyle: false,
    config: page.config,
    tooltip: (_, event, __, value) => showTip(value ? Object.entries(value) : null, event.clientX, event.clientY),
  };
  const { view } = await vegaEmbed(element, { ...spec, datasets, ...(params && { params }) }, options);
  return view;
}

/** Draw all charts below an element that are visible and not drawn yet. */
async function drawCharts(root) {
  for (const figure of root.querySelectorAll("figure[data-chart]:not([data-drawn])")) {
    const plot = figure.querySelector(".plot");
    if (!plot || plot.offsetParent === null) continue;
    figure.dataset.drawn = "";
    await drawChart(figure, plot);
  }
}

async function drawChart(figure, plot) {
  const { chart, run: runName } = figure.dataset;
  if (runName === "several") return embed(plot, page.several.specs[chart], severalRows(), 0);
  const run = Number(runName);
  if (chart === "any") return offerMetrics(figure, plot, run);
  if (figure.closest(".along")) {
    viewsAlong.set(figure, await embed(plot, page.runs[run].specs[chart], { along: rowsAlong(figure) }, 0));
    return showStep(figure); // the slider may have moved meanwhile
  }
  const rows = stepRows(run);
  showHeadline(figure, rows);
  await embed(plot, page.runs[run].specs[chart], { steps: rows, evaluations: page.runs[run].evaluations }, rows.length);
}

/** First and last value beside the chart's title. */
function showHeadline(figure, rows) {
  const told = (value) => value !== null && value !== undefined && !(value === 0 && "positive" in figure.dataset);
  const values = rows.map((row) => row[figure.dataset.headline]).filter(told);
  if (values.length) figure.querySelector(".headline").textContent = `${digits(values[0], 3)} → ${digits(values.at(-1), 3)}`;
}

/** The chart of the metric that the reader chooses. */
function offerMetrics(figure, plot, run) {
  const select = figure.querySelector("select");
  const names = Object.keys(page.runs[run].columns).filter((name) => name !== "global_step").sort();
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes("reward/trained")) select.value = "reward/trained";
  const draw = () => {
    const rows = stepRows(run).map((row) => ({ global_step: row.global_step, chosen: row[select.value] }));
    return embed(plot, page.specs.any, { steps: rows }, rows.length);
  };
  select.addEventListener("change", draw);
  return names.length ? draw() : undefined;
}

document.querySelectorAll(".step-choice").forEach(followStep);
