"use strict";
// One picture of the study: a plane drawn on a canvas, what is written around it, and the mouse on it.
// A pane keeps nothing but its caches: what it shows is in `review.state`, which page.js owns.

const FIT_MARGIN = 0.94; // of the pane that the fitted region fills
const WHEEL_NOTCH = 50; // wheel units that make one slice; a mouse sends 100 or more at once, a touchpad few at a time
const LARGEST_ZOOM = 24;
const CACHED_CONTOURS = 3000;
const TRACK_WIDTH = 16;
const WIDEST_LANE = 3;

class Pane {
  constructor(review, planeName) {
    this.review = review;
    this.element = document.getElementById("pane").content.firstElementChild.cloneNode(true);
    this.canvas = this.element.querySelector("canvas");
    this.track = this.element.querySelector(".track");
    this.part = (name) => this.element.querySelector(`.${name}`);
    this.slice = document.createElement("canvas");
    this.painted = "";
    this.contours = new Map();
    this.turned = 0;
    this.pointer = null;
    this.setPlane(planeName);
    this.listen();
    new ResizeObserver(() => review.redraw()).observe(this.element);
  }

  setPlane(planeName) {
    if (this.planeName === planeName) return;
    this.planeName = planeName;
    this.plane = PLANES[planeName];
    this.element.dataset.plane = planeName;
    this.element.setAttribute("aria-label", `${this.plane.name} slices`);
    ["left", "right", "top", "bottom"].forEach((side, i) => (this.part(`edge.${side}`).textContent = this.plane.edges[i]));
    this.contours.clear();
  }

  /** `sets`: which contours are drawn, of "drawn" and "reference". */
  draw(sets) {
    const { width, height } = this.element.getBoundingClientRect();
    if (!width || !height) return;
    const ratio = window.devicePixelRatio || 1;
    const [across, downwards] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== across || this.canvas.height !== downwards) [this.canvas.width, this.canvas.height] = [across, downwards];
    this.size = { width, height };
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#000";
    context.fillRect(0, 0, across, downwards);
    const { scale, u, v } = this.view();
    context.setTransform(scale * ratio, 0, 0, scale * ratio, (width / 2 - u * scale) * ratio, (height / 2 - v * scale) * ratio);
    this.drawSlice(context);
    if (this.review.state.show.contours) for (const set of sets) this.drawContours(context, set, scale);
    if (this.review.state.show.crosshair) this.drawCrosshair(context, scale);
    this.write(sets, scale);
    this.drawTrack(ratio);
  }

  /** Pixels a mm, and which point of the plane lies in the middle. */
  view() {
    const { zoom, shift } = this.review.state.views[this.planeName];
    const { left, top, width, height } = this.review.regions[this.planeName];
    const scale = FIT_MARGIN * Math.min(this.size.width / width, this.size.height / height) * zoom;
    return { scale, u: left + width / 2 + shift[0], v: top + height / 2 + shift[1] };
  }

  index() {
    return this.review.state.position[this.plane.normal];
  }

  drawSlice(context) {
    const { ct, grid } = this.review.study;
    const { level, width } = this.review.state.window;
    const index = ct.grid.nearest(this.plane.normal, grid.mm(this.plane.normal, this.index()));
    const wanted = [this.planeName, index, level, width].join();
    if (this.painted !== wanted) paintSlice(ct, this.plane, index, this.review.greys(), this.slice);
    this.painted = wanted;
    const frame = frameOf(ct.grid, this.plane);
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.slice, frame.left, frame.top, frame.width, frame.height);
  }

  drawContours(context, set, scale) {
    context.lineJoin = "round";
    for (const structure of this.review.visible()) {
      const path = this.contour(structure, set);
      if (!path) continue;
      if (this.review.state.show.fill && set === "drawn") {
        context.globalAlpha = 0.22;
        context.fillStyle = structure.colour;
        context.fill(path, "evenodd");
        context.globalAlpha = 1;
      }
      const current = structure === this.review.state.current;
      context.setLineDash(set === "reference" ? [6 / scale, 4 / scale] : []);
      context.strokeStyle = "rgba(0, 0, 0, 0.55)";
      context.lineWidth = (current ? 4.6 : 3.4) / scale;
      context.stroke(path);
      context.strokeStyle = structure.colour;
      context.lineWidth = (current ? 2.4 : 1.6) / scale;
      context.stroke(path);
    }
    context.setLineDash([]);
  }

  contour(structure, set) {
    const mask = structure[set];
    if (!mask) return null;
    const key = `${structure.number} ${set} ${this.index()}`;
    if (!this.contours.has(key)) {
      if (this.contours.size > CACHED_CONTOURS) this.contours.clear();
      this.contours.set(key, contourPath(mask, this.review.study.grid, this.plane, this.index()));
    }
    return this.contours.get(key);
  }

  drawCrosshair(context, scale) {
    const [u, v] = this.planePoint(this.review.state.position);
    const gap = 9 / scale;
    const reach = 1e4;
    context.strokeStyle = "rgba(240, 217, 160, 0.55)";
    context.lineWidth = 1 / scale;
    context.beginPath();
    for (const [from, to] of [[-reach, -gap], [gap, reach]]) {
      context.moveTo(u + from, v);
      context.lineTo(u + to, v);
      context.moveTo(u, v + from);
      context.lineTo(u, v + to);
    }
    context.stroke();
  }

  planePoint(index) {
    const { grid } = this.review.study;
    const { right, down, sign } = this.plane;
    return [grid.mm(right, index[right]), sign * grid.mm(down, index[down])];
  }

  write(sets, scale) {
    const { study, state } = this.review;
    const axis = this.plane.normal;
    const title = this.part("title");
    const whose = document.createElement("small");
    whose.textContent = state.show.beside ? ` ${sets[0]}` : "";
    title.replaceChildren(this.plane.name, whose);
    const mm = study.grid.mm(axis, this.index()).toFixed(1).replace("-", "−");
    this.part("place").textContent = `${"xyz"[axis]} ${mm} mm   ${this.index() + 1} / ${study.grid.shape[axis]}`;
    const length = [200, 100, 50, 20, 10, 5, 2, 1].find((mm) => mm * scale <= this.size.width * 0.22) ?? 1;
    this.part("scale i").style.width = `${length * scale}px`;
    this.part("scale b").textContent = `${length} mm`;
    this.writeProbe();
  }

  writeProbe() {
    const probe = this.part("probe");
    probe.textContent = "";
    if (!this.pointer) return;
    const { study } = this.review;
    const index = this.indexAt(this.pointer);
    const voxel = index.map((i, axis) => study.ct.grid.nearest(axis, study.grid.mm(axis, i)));
    const hu = study.ct.hu[voxel.reduce((sum, i, axis) => sum + i * study.ct.grid.strides[axis], 0)];
    const names = this.review.visible().filter((s) => s.drawn?.has(index)).map((s) => s.name);
    probe.textContent = [...names, `${String(hu).replace("-", "−")} HU`].join("   ");
  }

  /** Where each structure lies along the slices: the strip on the right, its current slice marked. */
  drawTrack(ratio) {
    const [width, height] = [TRACK_WIDTH, this.size.height];
    [this.track.width, this.track.height] = [width * ratio, Math.round(height * ratio)];
    const context = this.track.getContext("2d");
    context.scale(ratio, ratio);
    context.fillStyle = "rgba(16, 20, 26, 0.72)";
    context.fillRect(0, 0, width, height);
    const lanes = this.trackLanes();
    const lane = Math.min(WIDEST_LANE, (width - 4) / lanes.length);
    lanes.forEach((structures, number) => {
      for (const { colour, from, to } of structures) {
        const ends = [this.trackPlace(from - 0.5), this.trackPlace(to - 0.5)];
        context.fillStyle = colour;
        context.fillRect(3 + number * lane, Math.min(...ends), lane * 0.7, Math.abs(ends[1] - ends[0]));
      }
    });
    context.fillStyle = "#fff";
    context.fillRect(0, this.trackPlace(this.index()) - 1, width, 2);
  }

  /** Visible structures in as few lanes as keep them apart. */
  trackLanes() {
    const axis = this.plane.normal;
    const spans = this.review.visible().filter((structure) => structure.middle).map(({ colour, drawn, reference }) => {
      const { start, shape } = drawn ?? reference;
      return { colour, from: start[axis], to: start[axis] + shape[axis] };
    });
    const lanes = [];
    for (const span of spans.sort((a, b) => a.from - b.from)) {
      const free = lanes.find((lane) => lane.at(-1).to < span.from);
      if (free) free.push(span);
      else lanes.push([span]);
    }
    return lanes;
  }

  trackPlace(index) {
    const share = (index + 0.5) / this.review.study.grid.shape[this.plane.normal];
    return this.size.height * (this.plane.wheel > 0 ? 1 - share : share);
  }

  /** The voxel of the full grid at a point of the pane, in CSS pixels from its corner. */
  indexAt([left, top]) {
    const { scale, u, v } = this.view();
    const { right, down, normal, sign } = this.plane;
    const { grid } = this.review.study;
    const index = [0, 0, 0];
    index[right] = grid.nearest(right, u + (left - this.size.width / 2) / scale);
    index[down] = grid.nearest(down, sign * (v + (top - this.size.height / 2) / scale));
    index[normal] = this.index();
    return index;
  }

  listen() {
    const place = (event) => {
      const corner = this.element.getBoundingClientRect();
      return [event.clientX - corner.left, event.clientY - corner.top];
    };
    this.element.addEventListener("wheel", (event) => this.onWheel(event, place(event)), { passive: false });
    this.element.addEventListener("pointermove", (event) => {
      this.pointer = place(event);
      if (this.size) this.writeProbe();
    });
    this.element.addEventListener("pointerenter", () => (this.review.under = this));
    this.element.addEventListener("pointerleave", () => {
      this.pointer = null;
      this.review.under = null;
      this.part("probe").textContent = "";
    });
    this.element.addEventListener("contextmenu", (event) => event.preventDefault());
    this.element.addEventListener("dblclick", () => this.review.showAlone(this.planeName));
    this.canvas.addEventListener("pointerdown", (event) => this.onDrag(event, place));
    this.track.addEventListener("pointerdown", (event) => this.onTrack(event, place));
    this.track.addEventListener("dblclick", (event) => event.stopPropagation());
  }

  onWheel(event, point) {
    event.preventDefault();
    this.review.under = this;
    if (event.ctrlKey || event.metaKey) {
      this.zoomAt(point, Math.exp(-event.deltaY / 400));
      return;
    }
    const notches = event.deltaMode === 0 ? event.deltaY / WHEEL_NOTCH : event.deltaY;
    this.turned += Math.abs(notches) >= 1 ? Math.sign(notches) : notches;
    const steps = Math.trunc(this.turned);
    this.turned -= steps;
    if (steps) this.review.step(this.planeName, -steps);
  }

  zoomAt([left, top], factor) {
    const before = this.view();
    const view = this.review.state.views[this.planeName];
    view.zoom = Math.min(Math.max(view.zoom * factor, 0.2), LARGEST_ZOOM);
    const after = this.view();
    view.shift[0] += (left - this.size.width / 2) * (1 / before.scale - 1 / after.scale);
    view.shift[1] += (top - this.size.height / 2) * (1 / before.scale - 1 / after.scale);
    this.review.redraw();
  }

  onDrag(event, place) {
    const { state } = this.review;
    const moves = event.button === 1 || (event.button === 0 && event.shiftKey);
    const windows = event.button === 2;
    let last = place(event);
    const drag = (moved) => {
      const now = place(moved);
      const [across, downwards] = [now[0] - last[0], now[1] - last[1]];
      last = now;
      if (moves) {
        const { scale } = this.view();
        const { shift } = state.views[this.planeName];
        shift[0] -= across / scale;
        shift[1] -= downwards / scale;
        this.review.redraw();
      } else if (windows) {
        this.review.setWindow({ level: state.window.level - downwards * 2, width: Math.max(10, state.window.width + across * 4) });
      } else {
        this.review.goTo(this.indexAt(now));
      }
    };
    if (!moves && !windows) drag(event);
    this.follow(event, this.canvas, drag);
  }

  onTrack(event, place) {
    const drag = (moved) => {
      const share = place(moved)[1] / this.size.height;
      const slices = this.review.study.grid.shape[this.plane.normal];
      const index = [...this.review.state.position];
      index[this.plane.normal] = Math.floor((this.plane.wheel > 0 ? 1 - share : share) * slices);
      this.review.goTo(index);
    };
    drag(event);
    this.follow(event, this.track, drag);
  }

  follow(event, element, drag) {
    element.setPointerCapture(event.pointerId);
    element.addEventListener("pointermove", drag);
    const end = () => element.removeEventListener("pointermove", drag);
    element.addEventListener("pointerup", end, { once: true });
    element.addEventListener("pointercancel", end, { once: true });
  }
}
