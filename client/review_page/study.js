"use strict";
// What client/review.py embedded, unpacked: the CT, each structure's mask, and the grids they lie on.
// Everything here is in (x, y, z) order; positions are LPS mm, as in the DICOM files.

const DAMAGED = "The file is damaged or incomplete: copy the file again, or write it anew with anatomynet-client review.";

/** A regular grid along the patient's axes. */
class Grid {
  constructor({ shape, spacing, origin }) {
    this.shape = shape;
    this.spacing = spacing;
    this.origin = origin;
    this.strides = [1, shape[0], shape[0] * shape[1]];
  }

  /** LPS mm of a voxel's centre, along one axis. */
  mm(axis, index) {
    return this.origin[axis] + index * this.spacing[axis];
  }

  /** The voxel that holds a position, along one axis; the outermost voxel for a position outside. */
  nearest(axis, mm) {
    const index = Math.round((mm - this.origin[axis]) / this.spacing[axis]);
    return Math.min(Math.max(index, 0), this.shape[axis] - 1);
  }
}

/** One structure in one set of contours: its voxels, within its own box of the full grid. */
class Mask {
  constructor({ start, shape }, bits) {
    this.start = start;
    this.shape = shape;
    this.strides = [1, shape[0], shape[0] * shape[1]];
    this.inside = new Uint8Array(shape[0] * shape[1] * shape[2]);
    for (let i = 0; i < this.inside.length; i++) this.inside[i] = (bits[i >> 3] >> (7 - (i & 7))) & 1;
  }

  has(index) {
    let offset = 0;
    for (let axis = 0; axis < 3; axis++) {
      const within = index[axis] - this.start[axis];
      if (within < 0 || within >= this.shape[axis]) return false;
      offset += within * this.strides[axis];
    }
    return this.inside[offset] === 1;
  }
}

function bytesFromBase64(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function inflate(base64) {
  try {
    const stream = new Blob([bytesFromBase64(base64)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch (cause) {
    throw new Error(DAMAGED, { cause });
  }
}

/** Low bytes, then high bytes, of the zigzag difference to the voxel on the left -> HU, from `offset` on. */
function undoDifferences(bytes, columns, hu, offset) {
  const count = bytes.length / 2;
  for (let i = 0; i < count; i++) {
    const zigzag = bytes[i] | (bytes[count + i] << 8);
    const difference = (zigzag >>> 1) ^ -(zigzag & 1);
    hu[offset + i] = i % columns ? hu[offset + i - 1] + difference : difference;
  }
  return offset + count;
}

async function readMask(packed) {
  return packed && new Mask(packed, await inflate(packed.bits));
}

/** The whole study; `progress` is called with a share between 0 and 1. */
async function readStudy(progress) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser is too old for the page. Chrome or Edge 92, Firefox 113, Safari 16.4, or newer will open it.");
  }
  const study = JSON.parse(document.getElementById("review-data").textContent);
  study.grid = new Grid(study.grid);
  const ct = new Grid(study.ct);
  const hu = new Int16Array(ct.shape[0] * ct.shape[1] * ct.shape[2]);
  const blocks = [...document.querySelectorAll("script.ct")];
  let offset = 0;
  for (const [number, block] of blocks.entries()) {
    offset = undoDifferences(await inflate(block.textContent), ct.shape[0], hu, offset);
    block.remove();
    progress((number + 1) / blocks.length);
  }
  if (offset !== hu.length) throw new Error(DAMAGED);
  study.ct = { grid: ct, hu };
  for (const structure of study.structures) {
    structure.drawn = await readMask(structure.drawn);
    structure.reference = await readMask(structure.reference);
  }
  return study;
}
