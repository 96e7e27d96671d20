"use strict";
// Tabs, the choice of a run, and print.

const tabs = [...document.querySelectorAll("[role=tab]")];
const panels = tabs.map((tab) => document.getElementById(tab.getAttribute("aria-controls")));

function showTab(chosen) {
  tabs.forEach((tab, place) => {
    tab.setAttribute("aria-selected", String(place === chosen));
    tab.tabIndex = place === chosen ? 0 : -1;
    panels[place].hidden = place !== chosen;
  });
  const choice = document.getElementById("run-field"); // of no use where all runs are shown
  if (choice) choice.hidden = panels[chosen].id === "panel-several";
  fill(panels[chosen]);
}

/** Draw what the panel shows. */
async function fill(panel) {
  openTokenViews(panel);
  await drawCharts(panel);
  panel.dataset.ready = "";
}

tabs.forEach((tab, place) => {
  tab.addEventListener("click", () => showTab(place));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = (to + tabs.length) % tabs.length;
    tabs[next].focus();
    showTab(next);
  });
});

document.getElementById("run-choice")?.addEventListener("change", (event) => {
  for (const part of document.querySelectorAll("[data-run-part]")) part.hidden = part.dataset.runPart !== event.target.value;
  fill(panels[tabs.findIndex((tab) => tab.getAttribute("aria-selected") === "true")]);
});

// Print shows every tab, so every chart must be drawn, at the width of a page.
matchMedia("print").addEventListener("change", (change) => {
  if (change.matches) panels.forEach(fill);
});

document.addEventListener("scroll", () => showTip(null), { passive: true, capture: true });
showTab(page.several ? tabs.length - 1 : 0);
