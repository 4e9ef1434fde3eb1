"use strict";
// The page: its state, the side panel, the buttons and the keys. Starts everything.
// The part of the address after # sets the state: #place=x,y,z (mm) &window=bone &main=coronal &hide=A,B
// &show=fill,-crosshair &layout=single &warning=1 &help

const WINDOWS = {
  soft: { level: 40, width: 400 },
  bone: { level: 400, width: 2000 },
  brain: { level: 40, width: 80 },
};
const REGION_MARGIN = 30; // mm around all structures that a fitted picture shows
const PAGE_OF_SLICES = 10;

class Review {
  constructor(study) {
    this.study = study;
    study.structures.forEach((structure, number) => (structure.number = number));
    this.hasReference = study.structures.some((structure) => structure.reference);
    this.regions = regionsToFit(study);
    this.under = null;
    this.state = {
      position: study.grid.shape.map((side) => Math.floor(side / 2)),
      window: { ...WINDOWS.soft },
      main: "axial",
      layout: "three",
      show: { contours: true, fill: false, crosshair: true, reference: true, beside: false },
      hidden: new Set(),
      current: null,
      warning: -1,
      views: {},
    };
    for (const name of Object.keys(PLANES)) this.state.views[name] = { zoom: 1, shift: [0, 0] };
    this.panes = Object.keys(PLANES).map((name) => new Pane(this, name));
    this.second = new Pane(this, "axial"); // the reference's, side by side
    document.getElementById("panes").append(...this.panes.map((pane) => pane.element), this.second.element);
    this.startWhereMostIsSeen();
  }

  /** The axial slice through the middle of one structure that shows the most of them; across, their common middle. */
  startWhereMostIsSeen() {
    const present = this.study.structures.filter((structure) => structure.middle);
    if (!present.length) return;
    const boxes = present.map(({ drawn, reference }) => drawn ?? reference);
    const seen = (z) => boxes.filter(({ start, shape }) => start[2] <= z && z < start[2] + shape[2]).length;
    const mean = (axis) => Math.round(present.reduce((sum, { middle }) => sum + middle[axis], 0) / present.length);
    const slices = present.map(({ middle }) => middle[2]).sort((a, b) => seen(b) - seen(a));
    this.state.position = [mean(0), mean(1), slices[0]];
  }

  /** The structures that are switched on. */
  visible() {
    return this.study.structures.filter((structure) => !this.state.hidden.has(structure));
  }

  greys() {
    const { level, width } = this.state.window;
    if (this.greysOf !== `${level} ${width}`) {
      this.greysOf = `${level} ${width}`;
      this.table = greysFromWindow(this.state.window);
    }
    return this.table;
  }

  redraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  draw() {
    const { state } = this;
    const beside = state.show.beside && this.hasReference;
    document.getElementById("panes").dataset.layout = beside ? "beside" : state.layout;
    for (const pane of this.panes) {
      const large = pane.planeName === state.main;
      pane.element.dataset.place = large ? "large" : "small";
      pane.element.style.order = large ? 0 : 1;
      pane.element.hidden = !large && (beside || state.layout === "single");
      if (!pane.element.hidden) pane.draw(beside ? ["drawn"] : state.show.reference ? ["reference", "drawn"] : ["drawn"]);
    }
    this.second.element.hidden = !beside;
    this.second.element.style.order = 2;
    if (beside) {
      this.second.setPlane(state.main);
      this.second.draw(["reference"]);
    }
    this.writeControls();
  }

  writeControls() {
    const { state } = this;
    for (const button of document.querySelectorAll("[data-window]")) {
      const { level, width } = WINDOWS[button.dataset.window];
      button.setAttribute("aria-pressed", level === state.window.level && width === state.window.width);
    }
    for (const button of document.querySelectorAll("[data-toggle]")) {
      button.hidden = !this.hasReference && ["reference", "beside"].includes(button.dataset.toggle);
      button.setAttribute("aria-pressed", state.show[button.dataset.toggle]);
    }
    const { level, width } = state.window;
    document.getElementById("window").textContent = `L ${Math.round(level)}  W ${Math.round(width)}`.replace("-", "−");
    document.getElementById("all").textContent = state.hidden.size ? "Show all" : "Hide all";
    for (const structure of this.study.structures) {
      structure.row.classList.toggle("current", structure === state.current);
      structure.box.checked = !state.hidden.has(structure) && !structure.box.disabled;
    }
    document.querySelectorAll("#warnings li").forEach((item, i) => item.classList.toggle("current", i === state.warning));
  }

  goTo(index) {
    this.state.position = index.map((i, axis) => Math.min(Math.max(i, 0), this.study.grid.shape[axis] - 1));
    this.redraw();
  }

  /** `slices` in the direction in which the wheel turns up: to the head, the front, the left. */
  step(planeName, slices) {
    const { normal, wheel } = PLANES[planeName];
    const index = [...this.state.position];
    index[normal] += wheel * slices;
    this.goTo(index);
  }

  setWindow(window) {
    this.state.window = window;
    this.redraw();
  }

  toggle(name) {
    this.state.show[name] = !this.state.show[name];
    this.redraw();
  }

  setHidden(structure, hidden) {
    if (hidden) this.state.hidden.add(structure);
    else this.state.hidden.delete(structure);
    this.redraw();
  }

  toggleAll() {
    this.state.hidden = new Set(this.state.hidden.size ? [] : this.study.structures);
    this.redraw();
  }

  setMain(planeName) {
    this.state.main = planeName;
    this.redraw();
  }

  showAlone(planeName) {
    this.state.layout = this.state.layout === "single" ? "three" : "single";
    this.setMain(planeName);
  }

  showStructure(structure) {
    this.state.current = structure;
    this.state.warning = -1;
    this.state.hidden.delete(structure);
    this.goTo(structure.middle);
    structure.row.scrollIntoView({ block: "nearest" });
  }

  showWarning(number) {
    const warning = this.study.warnings[number];
    this.state.warning = number;
    this.state.current = this.study.structures.find((structure) => structure.name === warning.structure) ?? null;
    if (this.state.current) this.state.hidden.delete(this.state.current);
    if (warning.index) this.goTo(warning.index);
    document.querySelectorAll("#warnings li")[number].scrollIntoView({ block: "nearest" });
    this.redraw();
  }

  nextStructure(step) {
    const present = this.study.structures.filter((structure) => structure.middle);
    if (present.length) this.showStructure(present[around(present.indexOf(this.state.current), step, present.length)]);
  }

  nextWarning(step) {
    const count = this.study.warnings.length;
    if (count) this.showWarning(around(this.state.warning, step, count));
  }
}

/** The number after (or before) `number` of `count`, round and round; -1 is before the first. */
function around(number, step, count) {
  if (number < 0) return step > 0 ? 0 : count - 1;
  return (number + step + count) % count;
}

/** For each plane the part that a picture shows at first: all structures and a margin, or the whole scan. */
function regionsToFit({ grid, structures }) {
  const masks = structures.flatMap(({ drawn, reference }) => [drawn, reference].filter(Boolean));
  const low = grid.shape.map((_, axis) => Math.min(...masks.map((mask) => mask.start[axis])));
  const high = grid.shape.map((_, axis) => Math.max(...masks.map((mask) => mask.start[axis] + mask.shape[axis] - 1)));
  const regions = {};
  for (const [name, plane] of Object.entries(PLANES)) {
    const whole = frameOf(grid, plane);
    regions[name] = whole;
    if (!masks.length) continue;
    const v = [low, high].map((end) => plane.sign * grid.mm(plane.down, end[plane.down])).sort((a, b) => a - b);
    const left = Math.max(whole.left, grid.mm(plane.right, low[plane.right]) - REGION_MARGIN);
    const right = Math.min(whole.left + whole.width, grid.mm(plane.right, high[plane.right]) + REGION_MARGIN);
    const top = Math.max(whole.top, v[0] - REGION_MARGIN);
    const bottom = Math.min(whole.top + whole.height, v[1] + REGION_MARGIN);
    regions[name] = { left, top, width: right - left, height: bottom - top };
  }
  return regions;
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function millilitres(volume) {
  return volume.toFixed(volume < 10 ? 2 : 1);
}

function fillStructures(review) {
  const { study } = review;
  const table = document.getElementById("structures");
  if (!study.structures.length) {
    table.replaceWith(element("p", { className: "none", textContent: "This structure set holds no contours on this CT." }));
    document.getElementById("all").hidden = true;
    return;
  }
  const headings = ["Name", "ml", ...(review.hasReference ? ["ref. ml", "Dice"] : [])];
  table.append(element("tr", {}, ...headings.map((text) => element("th", { textContent: text, scope: "col" }))));
  const flagged = new Set(study.warnings.map((warning) => warning.structure));
  for (const structure of study.structures) {
    const absent = !structure.middle;
    structure.box = element("input", { type: "checkbox", disabled: absent });
    structure.box.setAttribute("aria-label", `Show ${structure.name}`);
    structure.box.style.setProperty("--colour", structure.colour);
    structure.box.addEventListener("change", () => review.setHidden(structure, !structure.box.checked));
    const sure = structure.confidence ? `, border confidence ${structure.confidence.toFixed(2)}` : "";
    const title = `${structure.name}${sure}`;
    const name = element("button", { type: "button", textContent: structure.name, title, disabled: absent });
    name.addEventListener("click", () => review.showStructure(structure));
    const cell = element("div", { className: "name" }, structure.box, name);
    if (flagged.has(structure.name)) cell.append(element("span", { className: "flag", title: "There is a warning" }));
    const figures = [structure.drawn ? millilitres(structure.drawn_ml) : "none"];
    if (review.hasReference) figures.push(structure.reference ? millilitres(structure.reference_ml) : "none", structure.dice?.toFixed(2) ?? "–");
    structure.row = element("tr", { className: absent ? "absent" : "" }, element("td", {}, cell));
    structure.row.append(...figures.map((text) => element("td", { textContent: text })));
    table.append(structure.row);
  }
}

function fillWarnings(review) {
  const { warnings, grid } = review.study;
  const count = document.getElementById("warning-count");
  count.textContent = warnings.length;
  count.classList.toggle("some", warnings.length > 0);
  const list = document.getElementById("warnings");
  if (!warnings.length) {
    list.replaceWith(element("p", { className: "none", textContent: "None. Only gross faults are looked for." }));
  }
  for (const [number, warning] of warnings.entries()) {
    const content = [element("strong", { textContent: warning.structure ?? "Scan" }), warning.text];
    if (warning.index) {
      const [x, y, z] = warning.index.map((i, axis) => grid.mm(axis, i).toFixed(0).replace("-", "−"));
      content.push(element("small", { textContent: `at x ${x}, y ${y}, z ${z} mm` }));
    }
    const button = element("button", { type: "button" }, ...content);
    button.addEventListener("click", () => review.showWarning(number));
    list.append(element("li", {}, button));
  }
}

function fillStudy({ study, hasReference }) {
  const size = (values, digits) => values.map((value) => Number(value.toFixed(digits))).join(" × ");
  const facts = {
    CT: `${size(study.grid.shape, 0)} voxels`,
    Voxel: `${size(study.grid.spacing, 3)} mm`,
    Shown: `${size(study.ct.grid.spacing, 3)} mm; contours at full resolution`,
    ...(hasReference ? { Lines: "drawn solid, reference dashed" } : {}),
  };
  const pairs = (record) =>
    Object.entries(record).map(([term, text]) => element("div", {}, element("dt", { textContent: term }), element("dd", { textContent: text })));
  document.getElementById("study").append(...pairs(facts));
  const notes = document.getElementById("notes");
  notes.hidden = !study.notes.length;
  notes.append(...study.notes.map((note) => element("li", { textContent: note })));
  document.getElementById("patient").hidden = !study.header;
  document.getElementById("patient").append(...pairs(study.header ?? {}));
  document.getElementById("privacy").textContent = study.header
    ? "This file names the patient: handle it as you would the study."
    : "This file does not name the patient. Its pictures are still the patient's.";
}

function listen(review) {
  for (const button of document.querySelectorAll("[data-window]")) {
    button.addEventListener("click", () => review.setWindow({ ...WINDOWS[button.dataset.window] }));
  }
  for (const button of document.querySelectorAll("[data-toggle]")) {
    button.addEventListener("click", () => review.toggle(button.dataset.toggle));
  }
  const help = document.getElementById("help");
  document.getElementById("all").addEventListener("click", () => review.toggleAll());
  document.getElementById("help-button").addEventListener("click", () => help.showModal());
  const wheeled = () => review.under?.planeName ?? document.activeElement?.dataset?.plane ?? review.state.main;
  const slices = (count) => () => review.step(wheeled(), count);
  const preset = (name) => () => review.setWindow({ ...WINDOWS[name] });
  const zoom = (factor) => () => {
    const pane = review.panes.find((candidate) => candidate.planeName === wheeled());
    pane.zoomAt([pane.size.width / 2, pane.size.height / 2], factor);
  };
  const keys = {
    ArrowUp: slices(1), ArrowDown: slices(-1), PageUp: slices(PAGE_OF_SLICES), PageDown: slices(-PAGE_OF_SLICES),
    Home: slices(1e6), End: slices(-1e6),
    1: preset("soft"), 2: preset("bone"), 3: preset("brain"),
    a: () => review.setMain("axial"), c: () => review.setMain("coronal"), s: () => review.setMain("sagittal"),
    m: () => review.showAlone(review.state.main),
    v: () => review.toggle("contours"), f: () => review.toggle("fill"), x: () => review.toggle("crosshair"),
    r: () => review.hasReference && review.toggle("reference"), b: () => review.hasReference && review.toggle("beside"),
    "[": () => review.nextStructure(-1), "]": () => review.nextStructure(1),
    p: () => review.nextWarning(-1), n: () => review.nextWarning(1),
    "+": zoom(1.25), "=": zoom(1.25), "-": zoom(0.8),
    0: () => {
      review.state.views[wheeled()] = { zoom: 1, shift: [0, 0] };
      review.redraw();
    },
    h: () => help.showModal(), "?": () => help.showModal(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
}

/** Sets what the address asks for, after its #. */
function followAddress(review) {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const { state, study } = review;
  const names = (key) => (wanted.get(key) ?? "").split(",").filter(Boolean);
  if (wanted.has("warning")) review.showWarning(Math.min(Number(wanted.get("warning")), study.warnings.length) - 1);
  if (wanted.has("structure")) {
    const structure = study.structures.find((candidate) => candidate.name === wanted.get("structure") && candidate.middle);
    if (structure) review.showStructure(structure);
  }
  if (wanted.has("place")) review.goTo(names("place").map((mm, axis) => study.grid.nearest(axis, Number(mm))));
  if (WINDOWS[wanted.get("window")]) state.window = { ...WINDOWS[wanted.get("window")] };
  if (PLANES[wanted.get("main")]) state.main = wanted.get("main");
  if (wanted.get("layout") === "single") state.layout = "single";
  for (const name of names("show")) state.show[name.replace("-", "")] = !name.startsWith("-");
  for (const structure of study.structures) if (names("hide").includes(structure.name)) state.hidden.add(structure);
  if (wanted.has("help")) document.getElementById("help").showModal();
  review.redraw();
}

function fail(reason) {
  const status = document.getElementById("status");
  status.hidden = false;
  status.querySelector("h2").textContent = "The review page could not be opened";
  document.getElementById("progress").hidden = true;
  document.getElementById("status-text").textContent = reason?.message ?? String(reason);
  document.documentElement.dataset.state = "failed";
}

async function start() {
  const progress = document.getElementById("progress");
  const study = await readStudy((share) => (progress.value = share));
  const review = new Review(study);
  fillStructures(review);
  fillWarnings(review);
  fillStudy(review);
  listen(review);
  followAddress(review);
  window.addEventListener("hashchange", () => followAddress(review));
  review.draw();
  document.getElementById("status").hidden = true;
  document.documentElement.dataset.state = "ready";
}

window.addEventListener("error", (event) => fail(event.error ?? event.message));
start().catch(fail);
