"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
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

const TEXT = new Set(["run", "name", "source", "state", "provider", "instance_type", "gpu", "validation_set", "test_set", "hellaswag_set", "judge_panel", "started"]);
// What the page is about comes first: a narrow window shows it without scrolling.
const FIRST = ["run", "state", "train_loss", "validation_loss", "validation_set", "test_loss", "test_set", "hellaswag", "judge_score", "judge_panel", "cost_usd", "training_usd", "billed_hours", "gpu", "gpus", "parameters", "tokens"];
const LOSS_SET = { validation_loss: "validation_set", test_loss: "test_set" };
const SET_OF = { ...LOSS_SET, hellaswag: "hellaswag_set", judge_score: "judge_panel" };

function sorted() {
  const rows = data.rows.map((row, index) => ({ row, index }));
  const { key, down } = order;
  rows.sort((one, other) => {
    const a = one.row[key], b = other.row[key];
    const missing = (a === null) - (b === null);
    if (missing || a === null) return missing || one.index - other.index;
    // Losses and scores on different sets are never ranked together.
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

const AXES = { steps: "steps", tokens: "tokens", hours: "hours since the first billed moment", dollars: "dollars" };
const SMALL = { width: 1100, marginLeft: 62, marginRight: 20, marginBottom: 46, style: { fontSize: "12px" } };
const ticks = (key) => (key === "cost_usd" || key === "dollars" ? (value) => figure("cost_usd", value) : short);

function empty(box, text) {
  box.replaceChildren(element("p", { class: "empty" }, text));
}

function curves() {
  const box = document.getElementById("chart"), axis = document.getElementById("axis").value;
  const which = document.getElementById("curve").value, log = document.getElementById("log").checked;
  const shown = data.runs.filter((run) => !hidden.has(run.run) && run.curves[which].loss.length);
  if (!shown.length) return empty(box, "No run that is shown has logged this loss.");
  const points = shown.flatMap((run) => run.curves[which].loss.map((loss, index) => ({ run: run.run, at: run.curves[which][axis][index], loss })))
    .filter((point) => Number.isFinite(point.loss) && (!log || point.at > 0));
  const longest = Math.max(...shown.map((run) => run.curves[which].loss.length));
  const smooth = document.getElementById("smooth").checked && longest >= 60;
  const xy = { x: "at", y: "loss", z: "run", stroke: "run", ariaLabel: "run" };
  const wide = shown.length > 12 ? 1.1 : 1.8;
  const marks = [Plot.lineY(points, smooth ? Plot.windowY(Math.ceil(longest / 25), { ...xy, strokeWidth: wide, className: "curve" }) : { ...xy, strokeWidth: wide, className: "curve" })];
  // What was smoothed away stays visible where there is room for it.
  if (smooth && shown.length <= 6) marks.unshift(Plot.lineY(points, { ...xy, strokeWidth: 0.8, strokeOpacity: 0.3 }));
  if (longest < 40) marks.push(Plot.dot(points, { x: "at", y: "loss", r: 2.5, fill: "run" }));
  marks.push(Plot.tip(points, Plot.pointer({ x: "at", y: "loss", title: (point) => `${point.run}\n${which} loss ${figure("loss", point.loss)}\n${AXES[axis]} ${ticks(axis)(point.at)}` })));
  box.replaceChildren(Plot.plot({
    ...SMALL, height: 420, ariaLabel: `${which} loss over ${axis}`, marks,
    x: { type: log ? "log" : "linear", label: AXES[axis], tickFormat: ticks(axis), ticks: 9, labelOffset: 42 }, y: { grid: true, label: which + " loss" },
    color: { domain: shown.map((run) => run.run), range: shown.map((run) => colours.get(run.run)) },
  }), legend(shown.map((run) => [run.run, colours.get(run.run)])));
}

function legend(items) {
  return element("ul", { class: "legend" }, ...items.map(([name, paint]) => element("li", {}, element("i", { style: "background:" + paint }), name)));
}

function sets() {
  const found = new Map();
  for (const row of data.rows)
    for (const [loss, set] of Object.entries(LOSS_SET))
      if (row[loss] !== null && row.cost_usd !== null) found.set(row[set], loss);
  return found;
}

function pareto() {
  const box = document.getElementById("pareto"), set = document.getElementById("set").value, cost = document.getElementById("cost").value;
  const loss = sets().get(set);
  const points = data.rows.filter((row) => loss && row[LOSS_SET[loss]] === set && row[loss] !== null && row[cost] !== null && !hidden.has(row.run))
    .map((row) => ({ name: row.run || row.name, cost: row[cost], loss: row[loss], paint: colours.get(row.run) || "#8a9199" }));
  if (!points.length) return empty(box, "No run that is shown has both a loss and a cost.");
  const front = [];
  for (const point of [...points].sort((one, other) => one.cost - other.cost || one.loss - other.loss))
    if (!front.length || point.loss < front.at(-1).loss) front.push(point);
  const middle = (Math.min(...points.map((point) => point.cost)) + Math.max(...points.map((point) => point.cost))) / 2;
  const named = points.length <= 20 ? points : [];
  const beside = (side) => Plot.text(named.filter((point) => (point.cost > middle) === side), { x: "cost", y: "loss", text: "name", textAnchor: side ? "end" : "start", dx: side ? -9 : 9, dy: -7 });
  box.replaceChildren(Plot.plot({
    ...SMALL, height: 420, ariaLabel: `loss on ${set} against ${cost}`, inset: 16,
    x: { label: cost === "cost_usd" ? "dollars" : "node-hours", tickFormat: ticks(cost), ticks: 9, labelOffset: 42 }, y: { grid: true, label: "loss on " + set },
    marks: [
      Plot.lineY(front, { x: "cost", y: "loss", curve: "step-after", strokeDasharray: "4 4", className: "front-line" }),
      Plot.dot(points, { x: "cost", y: "loss", r: 5, fill: "paint", ariaLabel: "name", className: "points" }), beside(false), beside(true),
      Plot.tip(points, Plot.pointer({ x: "cost", y: "loss", title: (point) => `${point.name}\nloss ${figure("loss", point.loss)} for ${figure(cost, point.cost)}${cost === "cost_usd" ? "" : " node-hours"}` })),
    ],
  }));
}

function phases() {
  const box = document.getElementById("phases");
  const shown = data.runs.filter((run) => !hidden.has(run.run) && run.cost_usd > 0);
  if (!shown.length) return empty(box, "No run that is shown has cost anything.");
  const parts = shown.flatMap((run) => data.phases.filter((phase) => run.phases[phase] && run.phases[phase].usd > 0)
    .map((phase) => ({ run: run.run, phase, usd: run.phases[phase].usd, seconds: run.phases[phase].seconds })));
  box.replaceChildren(Plot.plot({
    ...SMALL, height: shown.length * 24 + 66, marginLeft: 230, marginRight: 90, ariaLabel: "dollars by phase",
    x: { label: "dollars", tickFormat: ticks("cost_usd"), ticks: 9, labelOffset: 42 }, y: { label: null, domain: shown.map((run) => run.run), tickSize: 0 },
    color: { domain: data.phases, range: data.phases.map((phase) => PHASE_COLOURS[phase]) },
    marks: [
      Plot.barX(parts, { x: "usd", y: "run", fill: "phase", order: data.phases, insetTop: 2, insetBottom: 2, className: "bars" }),
      Plot.text(shown, { x: "cost_usd", y: "run", text: (run) => figure("cost_usd", run.cost_usd) + (run.final ? "" : " or less"), textAnchor: "start", dx: 6 }),
      Plot.tip(parts, Plot.pointerY(Plot.stackX({ x: "usd", y: "run", z: "phase", order: data.phases, title: (part) => `${part.run}\n${part.phase}: ${figure("cost_usd", part.usd)}, ${Math.round(part.seconds)} s` }))),
    ],
  }), legend(data.phases.filter((phase) => parts.some((part) => part.phase === phase)).map((phase) => [phase, PHASE_COLOURS[phase]])));
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
    const head = ["step", "validation loss", "size", "where", "sha256"].map((name) => element("th", { class: name === "sha256" ? "text" : false }, name));
    made.append(element("h3", {}, "Checkpoints"), element("table", { class: "plain" }, element("thead", {}, element("tr", {}, ...head)), body));
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
document.getElementById("lead").textContent = `${totals.runs} ${totals.runs === 1 ? "run" : "runs"}, ${figure("cost_usd", totals.cost_usd)}, of which training ${figure("training_usd", totals.training_usd)}. Made ${data.made.replace("T", " ").slice(0, 16)} UTC.`;
const sources = new Set(data.rows.map((row) => row.published_by).filter(Boolean));
document.getElementById("sources").textContent = sources.size ? "Published rows: " + [...sources].join("; ") + "." : "";
for (const name of sets().keys()) document.getElementById("set").append(element("option", {}, name));
for (const id of ["axis", "curve", "log", "smooth"]) document.getElementById(id).addEventListener("change", curves);
for (const id of ["set", "cost"]) document.getElementById(id).addEventListener("change", pareto);
document.getElementById("all").addEventListener("click", () => { hidden.clear(); table(); charts(); });
document.getElementById("none").addEventListener("click", () => { data.runs.forEach((run) => hidden.add(run.run)); table(); charts(); });
document.getElementById("details").append(...data.runs.map(detail));
window.addEventListener("hashchange", reveal);
table();
charts();
reveal();
