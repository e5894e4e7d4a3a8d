"use strict";
// A closer look: every picture cut in two, full precision on the left, or the difference of both.
for (const viewer of document.querySelectorAll(".viewer")) {
  const cell = JSON.parse(viewer.dataset.cell), count = Number(viewer.dataset.count);
  const sheets = [...viewer.closest("section").querySelectorAll(".strips img")];
  const canvas = viewer.querySelector("canvas"), slider = viewer.querySelector("[type=range]");
  const output = viewer.querySelector("output");
  const columns = Math.ceil(Math.sqrt(count)), rows = Math.ceil(count / columns), gap = 4;
  const zoom = Math.max(1, Math.floor(560 / (columns * cell.width)));
  const width = Math.round(cell.width * zoom), height = Math.round(cell.height * zoom);
  canvas.width = columns * (width + gap) - gap;
  canvas.height = rows * (height + gap) - gap;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false;

  const chosen = (name) => viewer.querySelector(`[name=${name}]:checked`);
  const place = (i, across, wide, high) => [(i % across) * wide, Math.floor(i / across) * high];

  function draw(sheet, from, to) {
    const span = cell.width * (to - from);
    for (let i = 0; i < count && span > 0; i++) {
      const [sx, sy] = place(i, cell.columns, cell.width + cell.gap, cell.height + cell.gap);
      const [dx, dy] = place(i, columns, width + gap, height + gap);
      context.drawImage(sheet, sx + cell.width * from, sy, span, cell.height,
        dx + width * from, dy, width * (to - from), height);
    }
  }

  function pixels(sheet) {
    context.clearRect(0, 0, canvas.width, canvas.height);
    draw(sheet, 0, 1);
    return context.getImageData(0, 0, canvas.width, canvas.height);
  }

  function difference(sheet, gain) {
    const exact = pixels(sheets[0]), found = pixels(sheet);
    for (let i = 0; i < found.data.length; i++) {
      if (i % 4 < 3) found.data[i] = gain * Math.abs(found.data[i] - exact.data[i]);
    }
    context.putImageData(found, 0, 0);
  }

  function show() {
    const variant = chosen("variant"), gain = Number(chosen("show").value);
    const sheet = sheets[Number(variant.value)], name = variant.dataset.name;
    slider.disabled = gain > 0;
    if (gain > 0) {
      difference(sheet, gain);
      output.value = `Difference of ${name} from full precision, ${gain} times; black is none.`;
    } else {
      const at = Number(slider.value) / 100;
      context.clearRect(0, 0, canvas.width, canvas.height);
      draw(sheets[0], 0, at);
      draw(sheet, at, 1);
      output.value = `Left ${slider.value} % of each picture: full precision; right: ${name}.`;
    }
    canvas.setAttribute("aria-label", output.value);
  }

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect(), step = (width + gap) * (box.width / canvas.width);
    const at = ((event.clientX - box.left) % step) / (step - gap);
    slider.value = Math.round(100 * Math.min(1, Math.max(0, at)));
    show();
  });
  viewer.addEventListener("input", show);
  Promise.all(sheets.map((sheet) => sheet.decode())).then(() => {
    viewer.hidden = false;
    show();
  });
}

for (const button of document.querySelectorAll("[data-copies]")) {
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copies);
    const selection = window.getSelection(), range = document.createRange();
    range.selectNodeContents(source);
    selection.removeAllRanges();
    selection.addRange(range);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected: press Ctrl+C";
    }
  });
}

// Plots come last: plotly.js alone takes longer than the rest of the page, so it runs when nothing
// else is left to do, and then one plot at a time.
const undrawn = [...document.querySelectorAll("[data-figure]")];
const idly = window.requestIdleCallback ?? ((work) => setTimeout(work, 100)); // Safari has none

function plot(chart) {
  if (!window.Plotly) {
    const script = document.createElement("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.head.append(script);
  }
  const { data, layout } = JSON.parse(chart.dataset.figure);
  Plotly.newPlot(chart, data, layout, {
    displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"],
  });
}

function plotNext() {
  if (undrawn.length) {
    plot(undrawn.shift());
    idly(plotNext);
  }
}

window.addEventListener("load", () => idly(plotNext));
window.addEventListener("beforeprint", () => undrawn.splice(0).forEach(plot));
