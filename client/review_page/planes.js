"use strict";
// The three planes: how a slice of the CT becomes pixels, and a mask a contour. A plane's own coordinates are (u, v)
// in mm, u to the right of the picture and v down it: radiological, the patient's right on the left, the head up.

const PLANES = {
  axial: { name: "Axial", normal: 2, right: 0, down: 1, sign: 1, edges: ["R", "L", "A", "P"], wheel: 1 },
  coronal: { name: "Coronal", normal: 1, right: 0, down: 2, sign: -1, edges: ["R", "L", "H", "F"], wheel: -1 },
  sagittal: { name: "Sagittal", normal: 0, right: 1, down: 2, sign: -1, edges: ["A", "P", "H", "F"], wheel: 1 },
};
const LOWEST_HU = -1024;
const HIGHEST_HU = 3071;

/** Grey value of every Hounsfield unit, for ImageData: 0xAABBGGRR. */
function greysFromWindow({ level, width }) {
  const greys = new Uint32Array(HIGHEST_HU - LOWEST_HU + 1);
  for (let i = 0; i < greys.length; i++) {
    const share = (i + LOWEST_HU - (level - width / 2)) / width;
    greys[i] = 0xff000000 | (Math.round(255 * Math.min(Math.max(share, 0), 1)) * 0x010101);
  }
  return greys;
}

/** Draws one slice of the CT, a pixel a voxel, into a canvas of the slice's size. */
function paintSlice(ct, plane, index, greys, canvas) {
  const columns = ct.grid.shape[plane.right];
  const rows = ct.grid.shape[plane.down];
  canvas.width = columns;
  canvas.height = rows;
  const image = new ImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  const across = ct.grid.strides[plane.right];
  const downwards = ct.grid.strides[plane.down] * plane.sign;
  const first = index * ct.grid.strides[plane.normal] + (plane.sign < 0 ? (1 - rows) * downwards : 0);
  for (let row = 0, pixel = 0; row < rows; row++) {
    for (let column = 0, voxel = first + row * downwards; column < columns; column++, voxel += across) {
      pixels[pixel++] = greys[ct.hu[voxel] - LOWEST_HU];
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Outer faces of a grid in a plane: left, top, width and height in mm. */
function frameOf(grid, plane) {
  const side = (axis) => grid.shape[axis] * grid.spacing[axis];
  const face = (axis, sign) => sign * grid.mm(axis, sign > 0 ? -0.5 : grid.shape[axis] - 0.5);
  return { left: face(plane.right, 1), top: face(plane.down, plane.sign), width: side(plane.right), height: side(plane.down) };
}

// Where the border runs through four voxels, by which of them are inside (top left 8, top right 4, bottom right 2,
// bottom left 1): from side to side, the structure on the left hand. Voxels that touch at a corner stay apart.
const TOP = [0, 1];
const RIGHT = [1, 2];
const BOTTOM = [2, 1];
const LEFT = [1, 0];
const STEPS = [
  [], [[BOTTOM, LEFT]], [[RIGHT, BOTTOM]], [[RIGHT, LEFT]],
  [[TOP, RIGHT]], [[TOP, RIGHT], [BOTTOM, LEFT]], [[TOP, BOTTOM]], [[TOP, LEFT]],
  [[LEFT, TOP]], [[BOTTOM, TOP]], [[LEFT, TOP], [RIGHT, BOTTOM]], [[RIGHT, TOP]],
  [[LEFT, RIGHT]], [[BOTTOM, RIGHT]], [[LEFT, BOTTOM]], [],
];

/** Closed lines halfway between the voxels inside and outside; `inside(column, row)` is 0 or 1, 0 beyond its range. */
function traceBorder(inside, columns, rows) {
  const stride = 2 * columns + 3; // keys are half voxels, shifted so that -1 becomes 0
  const next = new Map();
  for (let row = -1; row < rows; row++) {
    for (let column = -1; column < columns; column++) {
      const corners =
        (inside(column, row) << 3) | (inside(column + 1, row) << 2) | (inside(column + 1, row + 1) << 1) | inside(column, row + 1);
      for (const [from, to] of STEPS[corners]) {
        const key = ([down, right]) => (2 * row + 2 + down) * stride + 2 * column + 2 + right;
        next.set(key(from), key(to));
      }
    }
  }
  const lines = [];
  for (const start of next.keys()) {
    const line = [];
    for (let key = start; next.has(key); ) {
      line.push([((key % stride) - 2) / 2, (Math.floor(key / stride) - 2) / 2]);
      const following = next.get(key);
      next.delete(key);
      key = following;
    }
    lines.push(line);
  }
  return lines;
}

/** A mask's contour in one slice of the full grid, as a Path2D in the plane's mm; null where there is none. */
function contourPath(mask, grid, plane, index) {
  const depth = index - mask.start[plane.normal];
  if (depth < 0 || depth >= mask.shape[plane.normal]) return null;
  const [columns, rows] = [mask.shape[plane.right], mask.shape[plane.down]];
  const [across, downwards] = [mask.strides[plane.right], mask.strides[plane.down]];
  const first = depth * mask.strides[plane.normal];
  const inside = (column, row) =>
    column < 0 || row < 0 || column >= columns || row >= rows ? 0 : mask.inside[first + column * across + row * downwards];
  const lines = traceBorder(inside, columns, rows);
  if (!lines.length) return null;
  const path = new Path2D();
  for (const line of lines) {
    for (const [number, [column, row]] of line.entries()) {
      const u = grid.mm(plane.right, mask.start[plane.right] + column);
      const v = plane.sign * grid.mm(plane.down, mask.start[plane.down] + row);
      if (number === 0) path.moveTo(u, v);
      else path.lineTo(u, v);
    }
    path.closePath();
  }
  return path;
}
