const FINGER = 30, HAND = 60;

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
