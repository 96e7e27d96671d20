"use strict";
// Draws the chosen curve of the chosen levels, one chart for each family.

const chosenLevels = new Set(page.shown);
const curveChoice = document.getElementById("curve");
const levelButtons = [...document.querySelectorAll("[data-level]")];

/** One row a point of the chosen levels. */
function pointsOf(curves) {
  return Object.entries(curves)
    .filter(([level]) => chosenLevels.has(level))
    .flatMap(([level, points]) => points.map(([batches, mean, low, high]) => ({ level, batches, mean, low, high })));
}

/** Smallest and largest value of some rows, so that all charts share one axis. */
function range(rows) {
  const values = rows.flatMap((row) => [row.low, row.high]).filter((value) => value !== null);
  return values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
}

let turn = 0; // the newest call of draw is the one that counts

async function draw() {
  const mine = ++turn;
  const families = page.curves[curveChoice.value].map(pointsOf);
  const domain = range(families.flat());
  const spec = structuredClone(page.spec);
  for (const layer of spec.layer) layer.encoding.y.scale.domain = domain;
  for (const button of levelButtons) button.setAttribute("aria-pressed", String(chosenLevels.has(button.dataset.level)));
  for (const figure of document.querySelectorAll("[data-family]")) {
    const points = families[Number(figure.dataset.family)];
    const plot = figure.querySelector(".plot");
    if (points.length) await embed(plot, spec, { points }, points.length);
    else plot.replaceChildren(make("p", "missing", "no chosen level has this curve"));
    if (mine !== turn) return;
  }
  document.body.dataset.ready = "";
}

for (const button of levelButtons) {
  button.addEventListener("click", () => {
    const { level } = button.dataset;
    if (!chosenLevels.delete(level)) chosenLevels.add(level);
    draw();
  });
}
document.getElementById("all-levels").addEventListener("click", () => {
  const all = levelButtons.map((button) => button.dataset.level);
  const complete = all.every((level) => chosenLevels.has(level));
  chosenLevels.clear();
  (complete ? page.shown : all).forEach((level) => chosenLevels.add(level));
  draw();
});
curveChoice.addEventListener("change", draw);
document.addEventListener("scroll", () => showTip(null), { passive: true, capture: true });
draw();
