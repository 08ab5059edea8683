"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const hidden = new Set();
const byRun = new Map(data.runs.map((run) => [run.run, run]));
const colours = new Map(data.runs.map((run, index) => [run.run, colour(index)]));
const PHASE_COLOURS = {
  training: "#2f9e63", redone: "#c2413b", evaluating: "#2b8fb3", preparing: "#d39a21", collecting: "#4f6fd0",
  booting: "#9a57c4", releasing: "#8a9199", idle: "#d4735e",
};
let order = { key: "started", down: true };

// Every text enters as text: names and samples may hold anything.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "click") made.addEventListener("click", value);
    else if (key === "change") made.addEventListener("change", value);
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Neighbours lie a golden angle apart; one lightness that stands out from a white page and from a dark one.
function colour(index) {
  return `oklch(0.64 0.15 ${Math.round(index * 137.508 + 255) % 360})`;
}

function figure(key, value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return key === "started" ? value.slice(0, 16).replace("T", " ") : value;
  if (/_usd$|^usd_/.test(key)) return "$" + value.toLocaleString("en", value < 0.1 && value > 0 ? { minimumFractionDigits: 4, maximumFractionDigits: 4 } : { minimumFractionDigits: 2, maximumFractionDigits: 2 });
  if (/loss$/.test(key)) return value.toFixed(4);
  if (/fraction$|^mfu$/.test(key)) return (value * 100).toFixed(1) + "%";
  if (/hours$/.test(key)) return value.toFixed(value < 1 ? 3 : 2);
  return short(value);
}

function short(value) {
  for (const [limit, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
    if (Math.abs(value) >= limit) return +(value / limit).toPrecision(3) + unit;
  return String(+value.toPrecision(4));
}

// ---------------------------------------------------------------- the table

const TEXT = new Set(["run", "name", "source", "state", "provider", "instance_type", "gpu", "validation_set", "test_set", "started"]);
// What the page is about comes first: a narrow window shows it without scrolling.
const FIRST = ["run", "state", "train_loss", "validation_loss", "test_loss", "test_set", "cost_usd", "training_usd", "billed_hours", "gpu", "gpus", "parameters", "tokens"];
const SET_OF = { validation_loss: "validation_set", test_loss: "test_set" };

function sorted() {
  const rows = data.rows.map((row, index) => ({ row, index }));
  const { key, down } = order;
  rows.sort((one, other) => {
    const a = one.row[key], b = other.row[key];
    const missing = (a === null) - (b === null);
    if (missing || a === null) return missing || one.index - other.index;
    // Losses on different sets are never ranked together.
    const set = SET_OF[key];
    if (set && one.row[set] !== other.row[set]) return String(one.row[set]) < String(other.row[set]) ? -1 : 1;
    const less = typeof a === "string" ? a.localeCompare(b) : a - b;
    return (down ? -less : less) || one.index - other.index;
  });
  return rows;
}

function table() {
  const shown = FIRST.concat(data.columns.filter((key) => !FIRST.includes(key))).filter((key) => key !== "name" && key !== "source" && data.rows.some((row) => row[key] !== null));
  const head = element("tr", {}, element("th", { class: "text" }, ""));
  for (const key of shown) {
    const sort = order.key === key ? (order.down ? "descending" : "ascending") : "none";
    const click = () => { order = { key, down: order.key === key ? !order.down : false }; table(); };
    head.append(element("th", { class: TEXT.has(key) ? "text" : false, "aria-sort": sort },
      element("button", { type: "button", "data-key": key, click }, key.replaceAll("_", " "))));
  }
  const fronts = new Set([...data.fronts.validation_loss, ...data.fronts.test_loss]);
  const body = element("tbody");
  for (const { row, index } of sorted()) {
    const line = element("tr", { class: row.source === "published" ? "published" : false });
    const box = element("input", { type: "checkbox", "aria-label": "show " + (row.run || row.name), change: () => toggle(row.run, box.checked) });
    box.checked = row.run && !hidden.has(row.run);
    line.append(element("td", { class: "text" }, ...(row.run ? [box] : [])));
    for (const key of shown) {
      const cell = element("td", { class: TEXT.has(key) ? "text" : fronts.has(index) && key === "cost_usd" ? "front" : false });
      if (key === "run") cell.append(row.run ? element("a", { href: "#" + row.run }, row.run) : element("span", { title: row.published_by || "" }, row.name || ""));
      else cell.append(figure(key, row[key]));
      line.append(cell);
    }
    body.append(line);
  }
  document.getElementById("table").replaceChildren(element("thead", {}, head), body);
}

function toggle(run, on) {
  if (on) hidden.delete(run); else hidden.add(run);
  charts();
}

// ---------------------------------------------------------------- charts

function ticks(low, high, count) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(value);
  return found;
}

// The ends of an axis, with room around them; equal values get an axis around them.
function ends(values, room) {
  // Not Math.min(...values): a thousand runs have more points than a call may have arguments.
  const low = values.reduce((one, other) => Math.min(one, other), Infinity), high = values.reduce((one, other) => Math.max(one, other), -Infinity);
  const pad = low === high ? Math.abs(low) * 0.05 || 1 : (high - low) * room;
  return [low - pad, high + pad];
}

function frame(box, xs, ys, { height = 420, room = 0, xname, yname, log = false }) {
  const width = 1100, left = 62, right = 14, top = 10, bottom = 44;
  const finite = (values) => values.filter((value) => Number.isFinite(value) && (!log || value > 0));
  const view = (value) => (log ? Math.log10(value) : value);
  const [low, high] = ends(finite(xs).map(view), room), [floor, ceiling] = ends(ys.filter(Number.isFinite), 0.04);
  const x = (value) => left + ((view(value) - low) / (high - low)) * (width - left - right);
  const y = (value) => height - bottom - ((value - floor) / (ceiling - floor)) * (height - top - bottom);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${yname} over ${xname}` });
  for (const value of ticks(floor, ceiling, 6)) {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, String(+value.toPrecision(4))));
  }
  for (const value of ticks(low, high, 7)) {
    const at = left + ((value - low) / (high - low)) * (width - left - right);
    svg.append(shape("line", { class: "axis", x1: at, x2: at, y1: height - bottom, y2: height - bottom + 4 }));
    svg.append(shape("text", { x: at, y: height - bottom + 18, "text-anchor": "middle" }, short(log ? 10 ** value : value)));
  }
  svg.append(shape("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  svg.append(shape("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, xname));
  box.replaceChildren(svg);
  return { svg, x, y };
}

function empty(box, text) {
  box.replaceChildren(element("p", { class: "empty" }, text));
}

function curves() {
  const box = document.getElementById("chart"), axis = document.getElementById("axis").value;
  const which = document.getElementById("curve").value, log = document.getElementById("log").checked;
  const shown = data.runs.filter((run) => !hidden.has(run.run) && run.curves[which].loss.length);
  if (!shown.length) return empty(box, "No run that is shown has logged this loss.");
  const xs = shown.flatMap((run) => run.curves[which][axis]), ys = shown.flatMap((run) => run.curves[which].loss);
  const { svg, x, y } = frame(box, xs, ys, { xname: axis, yname: which + " loss", log });
  for (const run of shown) {
    const one = run.curves[which];
    const points = one.loss.map((loss, index) => [one[axis][index], loss]).filter(([a, b]) => Number.isFinite(b) && (!log || a > 0));
    const line = shape("polyline", { fill: "none", stroke: colours.get(run.run), "stroke-width": shown.length > 12 ? 1.1 : 1.8, "data-run": run.run, points: points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ") });
    line.append(shape("title", {}, run.run));
    svg.append(line);
    if (points.length < 40) for (const [a, b] of points) svg.append(shape("circle", { cx: x(a), cy: y(b), r: 2.5, fill: colours.get(run.run) }));
  }
  box.append(legend(shown.map((run) => [run.run, colours.get(run.run)])));
}

function legend(items) {
  return element("ul", { class: "legend" }, ...items.map(([name, paint]) => element("li", {}, element("i", { style: "background:" + paint }), name)));
}

function sets() {
  const found = new Map();
  for (const row of data.rows)
    for (const [loss, set] of Object.entries(SET_OF))
      if (row[loss] !== null && row.cost_usd !== null) found.set(row[set], loss);
  return found;
}

function pareto() {
  const box = document.getElementById("pareto"), set = document.getElementById("set").value, cost = document.getElementById("cost").value;
  const loss = sets().get(set);
  const points = data.rows.filter((row) => loss && row[SET_OF[loss]] === set && row[loss] !== null && row[cost] !== null && !hidden.has(row.run));
  if (!points.length) return empty(box, "No run that is shown has both a loss and a cost.");
  const { svg, x, y } = frame(box, points.map((row) => row[cost]), points.map((row) => row[loss]), { room: 0.04, xname: cost === "cost_usd" ? "dollars" : "node-hours", yname: "loss on " + set });
  const front = [];
  for (const row of [...points].sort((one, other) => one[cost] - other[cost] || one[loss] - other[loss]))
    if (!front.length || row[loss] < front.at(-1)[loss]) front.push(row);
  svg.append(shape("polyline", { fill: "none", stroke: "currentColor", "stroke-dasharray": "4 4", points: front.map((row) => `${x(row[cost])},${y(row[loss])}`).join(" ") }));
  for (const row of points) {
    const name = row.run || row.name, paint = colours.get(row.run) || "#8a9199";
    const dot = shape("circle", { cx: x(row[cost]), cy: y(row[loss]), r: 5, fill: paint, "data-run": name });
    dot.append(shape("title", {}, `${name}: ${figure("loss", row[loss])} for ${figure("cost_usd", row.cost_usd)}`));
    svg.append(dot);
    const last = x(row[cost]) > 850;
    if (points.length <= 20) svg.append(shape("text", { x: x(row[cost]) + (last ? -9 : 9), y: y(row[loss]) + 4, "text-anchor": last ? "end" : "start" }, name));
  }
}

function phases() {
  const box = document.getElementById("phases");
  const shown = data.runs.filter((run) => !hidden.has(run.run) && run.cost_usd > 0);
  if (!shown.length) return empty(box, "No run that is shown has cost anything.");
  const width = 1100, left = 230, right = 90, row = 24, height = shown.length * row + 10;
  const most = Math.max(...shown.map((run) => run.cost_usd));
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "dollars by phase" });
  shown.forEach((run, index) => {
    const top = index * row + 5;
    let from = left;
    svg.append(shape("text", { x: left - 8, y: top + 14, "text-anchor": "end" }, run.run));
    for (const phase of data.phases) {
      const part = run.phases[phase];
      if (!part || part.usd <= 0) continue;
      const wide = (part.usd / most) * (width - left - right);
      const bar = shape("rect", { x: from, y: top, width: Math.max(wide, 0.5), height: row - 6, fill: PHASE_COLOURS[phase] });
      bar.append(shape("title", {}, `${phase}: ${figure("cost_usd", part.usd)}, ${Math.round(part.seconds)} s`));
      svg.append(bar);
      from += wide;
    }
    svg.append(shape("text", { x: from + 6, y: top + 14 }, figure("cost_usd", run.cost_usd) + (run.final ? "" : " or less")));
  });
  box.replaceChildren(svg, legend(data.phases.filter((phase) => shown.some((run) => run.phases[phase])).map((phase) => [phase, PHASE_COLOURS[phase]])));
}

function charts() {
  curves();
  pareto();
  phases();
}

// ---------------------------------------------------------------- each run

function detail(run) {
  const made = element("details", { id: run.run }, element("summary", {}, `${run.run}: ${run.state}${run.reason ? " (" + run.reason + ")" : ""}, ${figure("cost_usd", run.cost_usd)}`));
  // The body is made when it is first opened: fifty runs with their events are a large page.
  made.addEventListener("toggle", () => { if (made.open && made.children.length === 1) fill(made, run); });
  return made;
}

function fill(made, run) {
  for (const item of run.evaluations) {
    if (item.loss !== undefined) made.append(element("p", {}, `loss on ${item.name}: ${figure("loss", item.loss)}`));
    const text = item.text ?? item.sample;
    if (text !== undefined) made.append(element("h3", {}, "Sample"), element("pre", {}, (item.prompt || "") + text));
  }
  if (run.checkpoints.length) {
    const body = element("tbody", {}, ...run.checkpoints.map((item) => element("tr", {}, element("td", {}, String(item.step) + (item.best ? " best" : "")), element("td", {}, figure("loss", item.validation_loss)), element("td", {}, short(item.bytes) + "B"), element("td", {}, item.here ? "here" : "not here"), element("td", { class: "text" }, item.sha256.slice(0, 16)))));
    made.append(element("h3", {}, "Checkpoints"), element("table", {}, body));
  }
  made.append(element("h3", {}, "Spec"), element("pre", {}, JSON.stringify(run.spec, null, 2)));
  made.append(element("h3", {}, "Events"), element("pre", {}, run.events.map((item) => `${item.at.slice(0, 19)} ${item.kind} ${JSON.stringify(item.detail)}`).join("\n")));
}

function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") { target.open = true; target.scrollIntoView(); }
}

// ---------------------------------------------------------------- begin

const totals = data.totals;
document.getElementById("lead").textContent = `${totals.runs} runs, ${figure("cost_usd", totals.cost_usd)}, of which training ${figure("training_usd", totals.training_usd)}. Made ${data.made.replace("T", " ").slice(0, 16)} UTC.`;
for (const name of sets().keys()) document.getElementById("set").append(element("option", {}, name));
for (const id of ["axis", "curve", "log"]) document.getElementById(id).addEventListener("change", curves);
for (const id of ["set", "cost"]) document.getElementById(id).addEventListener("change", pareto);
document.getElementById("all").addEventListener("click", () => { hidden.clear(); table(); charts(); });
document.getElementById("none").addEventListener("click", () => { data.runs.forEach((run) => hidden.add(run.run)); table(); charts(); });
document.getElementById("details").append(...data.runs.map(detail));
window.addEventListener("hashchange", reveal);
table();
charts();
reveal();
