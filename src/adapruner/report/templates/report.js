"use strict";
// Draws every chart from the JSON beside it. A finger scrolls the page and does not zoom.
const coarse = matchMedia("(pointer: coarse)").matches;
const plots = [...document.querySelectorAll(".plot")];
for (const plot of plots) {
  const figure = JSON.parse(plot.parentElement.querySelector("script").textContent);
  figure.layout.dragmode = coarse ? false : "zoom";
  Plotly.newPlot(plot, figure.data, figure.layout, { responsive: true, displayModeBar: false });
}
// Paper is narrower than most screens: 680 CSS pixels lie between the margins of A4.
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((details) => (details.open = true));
  plots.forEach((plot) => Plotly.relayout(plot, { width: 680 }));
});
addEventListener("afterprint", () => plots.forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true })));
