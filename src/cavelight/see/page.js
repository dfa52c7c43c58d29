// Tells the values under the pointer, the finger or, with the arrow keys, the cursor. The page reads whole without it.
"use strict";
const content = JSON.parse(document.getElementById("data").textContent);

const link = document.getElementById("download");
link.href = URL.createObjectURL(new Blob([JSON.stringify(content)], { type: "application/json" }));

const said = (value) => (value === null ? "not finite" : Number(value.toPrecision(4)).toString().replace("-", "−"));

function follow(area) {
  const [f, p] = area.dataset.panel.split(".").map(Number);
  const panel = content.figures[f].panels[p];
  const isHeat = "rows" in panel;
  const rows = isHeat ? panel.rows.length : 1;
  const columns = isHeat ? panel.columns.length : panel.places.length;
  const output = area.closest("figure").querySelector("output");
  const cursor = area.appendChild(document.createElement("i"));
  cursor.className = "cursor";
  cursor.hidden = true;
  let row = 0, column = 0;

  // Where a column's middle lies, as a share of the width: layers side by side, or numbers on a scale.
  const places = isHeat || panel.dots ? null : panel.places.map(Number);
  const middle = (c) => places && columns > 1 ? (places[c] - places[0]) / (places[columns - 1] - places[0]) : (c + 0.5) / columns;
  const nearest = (share) => {
    let best = 0;
    for (let c = 1; c < columns; c++) if (Math.abs(middle(c) - share) < Math.abs(middle(best) - share)) best = c;
    return best;
  };

  function show() {
    cursor.hidden = false;
    if (isHeat) {
      Object.assign(cursor.style, {
        left: `${(100 * column) / columns}%`, width: `${100 / columns}%`,
        top: `${(100 * row) / rows}%`, height: `${100 / rows}%`,
      });
      const place = [panel.rows[row], `${panel.across} ${panel.columns[column]}`.trim()].join(", ");
      const value = panel.values[row][column];
      output.textContent = `${place}: ${value === null && panel.blank ? "there is none" : said(value)}`;
      return;
    }
    cursor.style.left = `${100 * middle(column)}%`;
    const lines = panel.lines.filter((line) => line.named && line.values[column] !== null);
    const place = panel.dots ? panel.places[column] : `direction ${panel.places[column]}`;
    output.textContent = `${place}: ${lines.map((line) => `${line.name} ${said(line.values[column])}`).join(" · ")}`;
  }

  function hide() {
    cursor.hidden = true;
    output.textContent = "";
  }

  area.tabIndex = 0;
  area.setAttribute("role", "group");
  area.setAttribute("aria-label", "values: move with the arrow keys");
  output.setAttribute("aria-live", "polite");
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const across = (event.clientX - box.left) / box.width, down = (event.clientY - box.top) / box.height;
    column = nearest(across);
    row = Math.min(rows - 1, Math.max(0, Math.floor(down * rows)));
    show();
  });
  area.addEventListener("pointerleave", hide);
  area.addEventListener("focus", () => area.matches(":focus-visible") && show());
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || (!isHeat && step[0])) return;
    event.preventDefault();
    row = Math.min(rows - 1, Math.max(0, row + step[0]));
    column = Math.min(columns - 1, Math.max(0, column + step[1]));
    show();
  });
}

document.querySelectorAll("[data-panel]").forEach(follow);
