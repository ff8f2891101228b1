const NARROW = 500, AXIS = 58, PANEL = 50, LEGEND = 26;
const { texts, steps, figures: specs } = JSON.parse(document.getElementById("specs").textContent);
for (const spec of Object.values(specs)) spec.data = { values: unpacked(spec.data) };
const anchors = Object.keys(specs);
const picker = document.getElementById("layer");
const views = new Map();  // of the figures that were drawn, with the width of the page then
const states = new Map();  // what each figure shows, or is about to show
const near = new Set();  // figures on the screen, or less than its height away
let width = innerWidth, all = new URLSearchParams(location.search).has("all") || !("IntersectionObserver" in window);

const sectionOf = (anchor) => document.getElementById(anchor);
const placeOf = (anchor) => document.getElementById("chart-" + anchor);
const hasLayers = (anchor) => specs[anchor].params?.some(({ name }) => name === "layer");
const stateOf = (anchor) => `${width} ${hasLayers(anchor) ? picker?.value : ""}`;
const isStale = (anchor) => states.get(anchor) !== stateOf(anchor);
const isMeasured = (anchor) =>
  !picker || !hasLayers(anchor) || specs[anchor].data.values.some(({ layer }) => layer === picker.value);

function unpacked(data) {
  const rows = Array.from({ length: data.rows }, () => ({}));
  const fill = (columns, value) => {
    for (const [field, column] of Object.entries(columns)) column.forEach((entry, k) => { rows[k][field] = value(entry); });
  };
  fill(data.texts, (entry) => texts[entry]);
  fill(data.steps, (entry) => steps[entry]);
  fill(data.values, (entry) => entry);
  return rows;
}

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

function fitted(anchor, room) {
  const spec = specs[anchor], { data, ...rest } = spec;
  const legends = new Map();
  let ranks = false;
  const adapted = JSON.parse(JSON.stringify(rest), (key, value) => {
    if (value?.legend && value.scale) {
      const legend = arranged(value, room);
      legends.set(value.field, Math.ceil(value.scale.domain.length / legend.columns));
      return { ...value, legend };
    }
    if (value?.name === "layer" && picker) return { ...value, value: picker.value };
    if (key !== "y" || value.type !== "nominal") return value;
    ranks = true;
    const narrow = room < NARROW ? { labelFontSize: 11, labelLimit: room * 0.45 } : {};
    return { ...value, axis: { ...value.axis, ...narrow } };
  });
  const rows = [...legends.values()], below = LEGEND * (room < 900 ? rows.reduce((a, b) => a + b, 0) : Math.max(0, ...rows));
  if (!spec.columns) {
    const height = spec.height + AXIS + below;
    return { height, spec: { ...adapted, data, width: room, height, autosize: { type: "fit", contains: "padding" } } };
  }
  const panels = spec.facet.sort.length;
  const most = Math.max(1, Math.min(spec.columns, Math.floor(room / 270)));
  const lines = Math.ceil(panels / most), columns = Math.ceil(panels / lines), wide = Math.floor(room / columns) - 60;
  // below a last row that is not full, a shared axis would stand alone
  const resolve = panels % columns ? { ...spec.resolve, axis: { x: "independent" } } : spec.resolve;
  const high = ranks ? spec.spec.height : Math.max(spec.spec.height, Math.min(240, Math.round(wide * 0.45)));
  const height = lines * (high + PANEL) + (panels % columns ? lines - 1 : 0) * 20 + AXIS + below;
  return { height, lines, spec: { ...adapted, data, columns, resolve, spec: { ...adapted.spec, width: wide, height: high } } };
}

function arranged({ legend, scale }, room) {
  const longest = Math.max(...scale.domain.map((label) => label.length));
  const columns = room < NARROW ? 1 : Math.max(1, Math.min(3, Math.floor(room / (longest * 7 + 40))));
  return { ...legend, columns, labelLimit: Math.min(320, room - 60) };
}

function reserve() {
  // so that nothing moves when figures are drawn later
  const rooms = anchors.map((anchor) => placeOf(anchor).clientWidth);
  anchors.forEach((anchor, k) => { if (rooms[k]) placeOf(anchor).style.minHeight = `${fitted(anchor, rooms[k]).height}px`; });
}

function mark(anchor) {
  const measured = isMeasured(anchor);
  placeOf(anchor).hidden = !measured;
  document.getElementById("none-" + anchor).hidden = measured;
}

function next() {
  const stale = anchors.filter((anchor) => (all || near.has(anchor)) && isStale(anchor));
  const onScreen = stale.filter((anchor) => {
    const { top, bottom } = sectionOf(anchor).getBoundingClientRect();
    return bottom > 0 && top < innerHeight;
  });
  document.body.dataset.drawn = onScreen.length || (all && stale.length) ? "no" : "yes";
  return onScreen[0] ?? stale[0];
}

async function drawStale() {
  for (let anchor = next(); anchor; anchor = next()) {
    await update(anchor);
    await new Promise((done) => setTimeout(done));  // the reader sees it before the others are drawn
  }
}

let drawing = null;
const draw = () => (drawing ??= drawStale().finally(() => { drawing = null; }));

async function update(anchor) {
  states.set(anchor, stateOf(anchor));
  mark(anchor);
  if (!isMeasured(anchor)) return;
  try {
    if (views.get(anchor)?.width === width) await choose(anchor);
    else await drawOne(anchor);
  } catch (error) {
    console.error(error);
    placeOf(anchor).textContent = `This figure cannot be drawn: ${error.message}`;
  }
}

async function drawOne(anchor) {
  const place = placeOf(anchor), room = place.clientWidth, at = width, { spec, height, lines } = fitted(anchor, room);
  place.style.minHeight = `${height}px`;
  views.get(anchor)?.result.finalize();
  const result = await vegaEmbed(place, spec, {
    actions: { export: true, source: false, compiled: false, editor: false },
    config: config(room),
    downloadFileName: anchor,
    i18n: { CLICK_TO_VIEW_ACTIONS: "Save this figure" },
    renderer: "svg",
    scaleFactor: { png: 3, svg: 1 },
  });
  views.set(anchor, { result, width: at });
  places.clear();
  if (lines) await fill(result.view, place, spec.columns, lines, height);
  name(anchor, place);
}

async function fill(view, place, columns, lines, height) {
  // how wide the axes and how high the titles are is known only now
  const { width, height: high } = place.querySelector("svg.marks");
  const wider = Math.floor((place.clientWidth - width.baseVal.value) / columns);
  const higher = Math.floor((height - high.baseVal.value) / lines);
  view.signal("child_width", Math.max(120, view.signal("child_width") + wider));
  await view.signal("child_height", Math.max(60, view.signal("child_height") + higher)).resize().runAsync();
}

function name(anchor, place) {
  const figure = place.querySelector(".chart-wrapper");
  for (const name of ["aria-hidden", "aria-label", "aria-roledescription"]) figure.removeAttribute(name);
  for (const mark of figure.querySelectorAll("[role^=graphics]")) {
    for (const name of ["role", "aria-roledescription"]) mark.removeAttribute(name);  // they have no names
  }
  figure.setAttribute("role", "img");
  figure.setAttribute("aria-labelledby", "title-" + anchor);
  figure.setAttribute("aria-describedby", "caption-" + anchor);
  place.querySelector("summary").setAttribute("aria-label", "Save this figure");
}

async function choose(anchor) {
  const { view } = views.get(anchor).result;
  for (const { name } of specs[anchor].params.filter((parameter) => parameter.bind === "scales")) {
    // axes that stayed zoomed would not show what another layer has
    for (const axis of Object.keys(view.signal(name))) view.signal(`${name}_${axis}`, null);
  }
  await view.signal("layer", picker.value).resize().runAsync();  // the numbers at its axes may be longer
  places.clear();
}

picker?.addEventListener("change", async () => {
  const { value } = picker;
  document.querySelector(".figures").dataset.layer = value;
  anchors.forEach(mark);
  await draw();
  document.body.dataset.layer = value;
});
let waiting;
addEventListener("resize", () => {
  if (innerWidth === width || matchMedia("print").matches) return;  // a phone's address bar comes and goes
  width = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(() => { reserve(); draw(); }, 200);
});
addEventListener("beforeprint", async () => {
  // the browser prints what is there when the first task ends, so without a pause
  for (const anchor of anchors) if (isStale(anchor)) await update(anchor);
});
reserve();
if (all) draw();
else {
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) near[isIntersecting ? "add" : "delete"](target.id);
    draw();
  }, { rootMargin: "100% 0px" });
  for (const anchor of anchors) observer.observe(sectionOf(anchor));
  if (!anchors.length) draw();
}
