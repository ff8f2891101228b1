const NARROW = 500, FINGER = 30, HAND = 60;
const views = new Map();
const picker = document.getElementById("layer");

function config(room) {
  // as figures are saved and printed; on a screen the style sheet has the last word
  const ink = "#1d2430", line = "#dfe3e8";
  const text = { labelColor: ink, titleColor: ink, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
  return {
    aria: false,  // the whole figure has a name; thousands of points need none
    background: "white",
    font: "system-ui, sans-serif",
    view: { stroke: line },
    axis: { ...text, gridColor: line, domainColor: line, tickColor: line },
    axisX: { titleAnchor: room < NARROW ? "end" : null },
    legend: { ...text, orient: "bottom", layout: { bottom: { anchor: "start", direction: room < 900 ? "vertical" : "horizontal" } } },
    header: text,
  };
}

function fitted(spec, room) {
  const { data, ...rest } = spec;
  let ranks = false;
  const adapted = JSON.parse(JSON.stringify(rest), (key, value) => {
    if ((key === "color" || key === "strokeDash") && value.legend) return { ...value, legend: arranged(value, room) };
    if (key !== "y" || value.type !== "nominal") return value;
    ranks = true;
    const narrow = room < NARROW ? { labelFontSize: 11, labelLimit: room * 0.45 } : {};
    return { ...value, axis: { ...value.axis, ...narrow } };
  });
  if (!spec.columns) return { ...adapted, data, width: room, autosize: { type: "fit-x", contains: "padding" } };
  const panels = new Set(data.values.map((row) => row[spec.facet.field])).size;
  const most = Math.max(1, Math.min(spec.columns, Math.floor(room / 270)));
  const columns = Math.ceil(panels / Math.ceil(panels / most)), width = Math.floor(room / columns) - 60;
  // below a last row that is not full, a shared axis would stand alone
  const resolve = panels % columns ? { ...spec.resolve, axis: { x: "independent" } } : spec.resolve;
  const height = ranks ? spec.spec.height : Math.max(spec.spec.height, Math.min(240, Math.round(width * 0.45)));
  return { ...adapted, data, columns, resolve, spec: { ...adapted.spec, width, height } };
}

function arranged({ legend, scale }, room) {
  const longest = Math.max(...scale.domain.map((label) => label.length));
  const columns = room < NARROW ? 1 : Math.max(1, Math.min(3, Math.floor(room / (longest * 7 + 40))));
  return { ...legend, columns, labelLimit: Math.min(320, room - 60) };
}

async function draw() {
  const turn = ++latest;
  for (const anchor of Object.keys(specs)) {
    if (turn !== latest) return;
    const place = document.getElementById("chart-" + anchor);
    try {
      await drawOne(anchor, place);
    } catch (error) {
      console.error(error);
      place.textContent = `This figure cannot be drawn: ${error.message}`;
    }
    await new Promise((next) => setTimeout(next));  // the reader sees it before the others are drawn
  }
  document.body.dataset.drawn = "yes";
}

async function drawOne(anchor, place) {
  place.hidden = false;
  const room = place.clientWidth, spec = fitted(specs[anchor], room);
  views.get(anchor)?.finalize();
  const result = await vegaEmbed(place, spec, {
    actions: { export: true, source: false, compiled: false, editor: false },
    config: config(room),
    downloadFileName: anchor,
    i18n: { CLICK_TO_VIEW_ACTIONS: "Save this figure" },
    renderer: "svg",
    scaleFactor: { png: 3, svg: 1 },
  });
  views.set(anchor, result);
  places.clear();
  if (spec.columns) await fillRow(result.view, place, spec.columns);
  const figure = place.querySelector(".chart-wrapper");
  for (const name of ["aria-hidden", "aria-label", "aria-roledescription"]) figure.removeAttribute(name);
  for (const mark of figure.querySelectorAll("[role^=graphics]")) {
    for (const name of ["role", "aria-roledescription"]) mark.removeAttribute(name);  // they have no names
  }
  figure.setAttribute("role", "img");
  figure.setAttribute("aria-labelledby", "title-" + anchor);
  figure.setAttribute("aria-describedby", "caption-" + anchor);
  place.querySelector("summary").setAttribute("aria-label", "Save this figure");
  if (picker?.selectedIndex > 0) await choose(anchor, picker.value);
}

async function fillRow(view, place, columns) {
  // how wide the axes are is known only now
  const spare = place.clientWidth - place.querySelector("svg.marks").width.baseVal.value;
  const width = view.signal("child_width") + Math.floor(spare / columns);
  await view.signal("child_width", Math.max(120, width)).resize().runAsync();
}

async function choose(anchor, layer) {
  const spec = specs[anchor], view = views.get(anchor)?.view;
  if (!view || !spec.params?.some((parameter) => parameter.name === "layer")) return;
  const measured = spec.data.values.some((row) => row.layer === layer);
  document.getElementById("chart-" + anchor).hidden = !measured;
  document.getElementById("none-" + anchor).hidden = measured;
  if (!measured) return;
  for (const { name } of spec.params.filter((parameter) => parameter.bind === "scales")) {
    // axes that stayed zoomed would not show what another layer has
    for (const axis of Object.keys(view.signal(name))) view.signal(`${name}_${axis}`, null);
  }
  await view.signal("layer", layer).resize().runAsync();  // the numbers at its axes may be longer
  places.clear();
}

function sort(heading) {
  const body = heading.closest("table").tBodies[0], column = heading.cellIndex;
  const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const rows = [...body.rows].map((row) => [row, row.cells[column].dataset.value]);
  const missing = (value) => ["", "–", "nan"].includes(value);
  const numbers = rows.every(([, value]) => missing(value) || !Number.isNaN(Number(value)));
  const compare = numbers ? (a, b) => a - b : (a, b) => a.localeCompare(b, undefined, { numeric: true });
  rows.sort(([, a], [, b]) => missing(a) - missing(b) || (missing(a) ? 0 : sign * compare(a, b)));
  body.append(...rows.map(([row]) => row));
}

const places = new Map();  // of each figure's points, until it changes

function pointsOf(svg) {
  if (!places.has(svg)) {
    const corner = svg.getBoundingClientRect();
    places.set(svg, [...svg.querySelectorAll(".mark-symbol.role-mark path")].map((mark) => {
      const { left, right, top, bottom } = mark.getBoundingClientRect();
      return { mark, x: (left + right) / 2 - corner.left, y: (top + bottom) / 2 - corner.top };
    }));
  }
  return places.get(svg);
}

function nearest(svg, clientX, clientY, reach) {
  const corner = svg.getBoundingClientRect(), x = clientX - corner.left, y = clientY - corner.top;
  let best = null, least = reach;
  for (const point of pointsOf(svg)) {
    const away = Math.hypot(point.x - x, point.y - y);
    if (away < least) [best, least] = [point, away];
  }
  return best;
}

function show(svg, point, { clientX, clientY }) {
  if (!point) return;
  point.mark.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX, clientY }));
  const place = svg.closest(".chart"), line = place.querySelector(".cross") ?? place.appendChild(document.createElement("div"));
  line.className = "cross";
  const corner = svg.getBoundingClientRect(), origin = line.offsetParent.getBoundingClientRect();
  const x = corner.left + point.x, y = corner.top + point.y;
  const panel = [...svg.querySelectorAll("path.background")].map((background) => background.getBoundingClientRect())
    .findLast(({ left, right, top, bottom }) => left <= x && x <= right && top <= y && y <= bottom) ?? corner;
  const { clientLeft, clientTop } = line.offsetParent;
  const left = x - origin.left - clientLeft, top = panel.top - origin.top - clientTop;
  Object.assign(line.style, { left: `${left}px`, top: `${top}px`, height: `${panel.height}px` });
}

for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sort(button.parentElement));
picker?.addEventListener("change", async () => {
  const { value } = picker;
  await Promise.all(Object.keys(specs).map((anchor) => choose(anchor, value)));
  document.body.dataset.layer = document.querySelector(".figures").dataset.layer = value;
});
document.addEventListener("wheel", (event) => {
  // with Shift, browsers turn the wheel sideways; what zooms looks at its vertical part
  if (!event.shiftKey || event.deltaY || !event.deltaX || !event.target.closest(".chart")) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  const { clientX, clientY, deltaX, deltaMode } = event;
  const same = { bubbles: true, cancelable: true, composed: true, shiftKey: true, clientX, clientY, deltaMode };
  event.target.dispatchEvent(new WheelEvent("wheel", { ...same, deltaY: deltaX }));
}, { capture: true, passive: false });
for (const event of ["wheel", "pointerdown", "pointerup", "change", "dblclick"]) {
  document.addEventListener(event, () => setTimeout(() => places.clear(), 50), { capture: true, passive: true });
}
document.addEventListener("pointermove", (event) => {
  const svg = event.target.closest?.("svg.marks");
  for (const line of document.querySelectorAll(".cross")) if (!svg || !line.parentElement.contains(svg)) line.remove();
  if (event.isTrusted && event.pointerType === "mouse" && !event.buttons && svg) show(svg, nearest(svg, event.clientX, event.clientY, HAND), event);
});
let touched = null;
const leave = () => touched?.mark.dispatchEvent(new MouseEvent("mouseout", { bubbles: true }));
document.addEventListener("click", (event) => {
  // a finger does not hover
  if (!matchMedia("(hover: none)").matches) return;
  leave();
  const svg = event.target.closest("svg.marks");
  touched = svg && nearest(svg, event.clientX, event.clientY, FINGER);
  if (touched) show(svg, touched, event);
});
addEventListener("scroll", leave, { passive: true });
let width = innerWidth, waiting, latest = 0;
addEventListener("resize", () => {
  if (innerWidth === width || matchMedia("print").matches) return;  // a phone's address bar comes and goes
  width = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(draw, 200);
});
draw();
