"""An anthropomorphic synthetic head-and-neck CT with every structure known: for training, tests and the demonstration.

    draw_person, draw_posture   what a seed draws: organs and their asymmetry; size, neck, turn of the head
    parts_of(person)            the table of anatomy (engine.phantom_anatomy): shapes in mm
    paint                       parts over one another, slab by slab, each in its own box only
    noise                       what a scanner adds

Every shape is evaluated in mm at the voxel centres, after the posture has carried these back into the anatomy's
frame: the anatomy does not depend on the grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.errors import GeometryError
from anatomynet.engine.geometry import ALIGNED_COSINE, IDENTITY, Index, Point, VolumeGeometry
from anatomynet.engine.phantom_anatomy import (
    AIR,
    BACK_Y,
    LEFT,
    RIGHT,
    VERTEX_Z,
    Part,
    Person,
    couch_part,
    parts_of,
)
from anatomynet.engine.phantom_shapes import Array, Shape, Union
from anatomynet.engine.structures import STRUCTURES, structures_by_name
from anatomynet.engine.volume import CTVolume, LabelArray, LabelMap

Millimetres = NDArray[np.float64]
Box = tuple[slice, slice, slice]
Wave = tuple[float, float, float, float]

PLANNING_SHAPE = (178, 512, 512)
PLANNING_SPACING = (0.9765625, 0.9765625, 2.0)  # a field of view of 500 mm; from the carina to the vertex
BODY_CENTRE_Y = 25.0  # of the anatomy's frame: lies on the scan's middle
NECK_Z = (-110.0, -10.0)  # over which the trunk's size and position pass into the head's
PIVOT = (0.0, 30.0, -60.0)  # about which the head turns: C5
WAVE_LIMITS = ((0.7, 0.05, -0.05, 0.0), (2.0, 0.11, 0.05, 6.28))  # of Posture.waves; lengths of 57 to 125 mm
HU_RANGE = (-1024, 3071)  # 12 bits, as scanners store them

SLAB_VOXELS = 2_000_000  # painted at a time: bounds the memory
SEARCH_STEP_MM = 8.0  # of the lattice on which a shape's box is looked up
GRAIN_SIDE = 32  # voxels of the repeating block of tissue texture, a power of two
GRAIN_STEP_MM = 1.5


@dataclass(frozen=True)
class Posture:
    """Size and pose: how the anatomy's frame lies in the scan.

    Attributes:
        head_scale: of the head along x, y, z.
        trunk_scale: of neck and trunk in the axial plane, and of the trunk's length.
        neck_scale: of the neck's length.
        flexion: of the head over the neck, radians; above zero the chin goes down.
        turn: of the head about z, radians; above zero the nose goes to the left.
        tilt: of the whole body about y, radians.
        roll: of the whole body about z, radians.
        shift: of the body in the scan, LPS mm.
        waves: sines (amplitude mm, two wave numbers per mm, phase) that displace x as a function of y and z, and y as
            one of x and z, in turns: no two people are the same, and no outline is a circle.
    """

    head_scale: Point = (1.0, 1.0, 1.0)
    trunk_scale: float = 1.0
    neck_scale: float = 1.0
    flexion: float = 0.0
    turn: float = 0.0
    tilt: float = 0.0
    roll: float = 0.0
    shift: Point = (0.0, 0.0, 0.0)
    waves: tuple[Wave, ...] = ()


def make_phantom(
    geometry: VolumeGeometry | None = None, *, seed: int = 0, structures: tuple[str, ...] | None = None
) -> tuple[CTVolume, LabelMap]:
    """A synthetic patient, supine, head first, and the truth about it.

    The body lies in the middle of the grid in x and y, with its vertex just under the top face, wherever the grid's
    origin is: as a radiographer sets up a scan. The same seed and geometry give the same bytes; grids with the same
    outer faces show the same anatomy.

    Args:
        geometry: of the result, its axes those of the patient; by default 178 x 512 x 512 over 356 x 500 x 500 mm.
        seed: of size, posture, asymmetry, tissue and noise.
        structures: names; label i + 1 is structures[i]. By default all of engine.structures.

    Returns:
        The CT, int16 HU (z, y, x), and its label map, uint8 (z, y, x).

    Raises:
        GeometryError: a grid whose axes are not those of the patient.
        ModelError: a name that is not in the catalogue.
    """
    chosen = structures_by_name(tuple(STRUCTURES) if structures is None else structures)
    grid = planning_geometry() if geometry is None else geometry
    if np.diag(np.array(grid.direction)).min() < ALIGNED_COSINE:
        raise GeometryError(
            f"phantom: expected direction {IDENTITY}, found {grid.direction}; use the grid's canonical()"
        )
    body_rng, noise_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    person, posture = draw_person(body_rng), draw_posture(body_rng)
    grain = _grain_block(body_rng)
    background = _couch_slice(grid, posture, body_rng)
    noise_hu = body_rng.uniform(8, 16)
    label_of = {s.name: i + 1 for i, s in enumerate(chosen)}
    strokes = [(part, label_of.get(part.label, 0)) for part in parts_of(person)]
    hu, labels = np.empty(grid.shape, dtype=np.int16), np.zeros(grid.shape, dtype=np.uint8)
    for first, last in _slabs(grid.shape):
        coordinates = _anatomy_coordinates(grid, posture, first, last)
        slab = _Slab(coordinates, background, labels[first:last], grid.spacing)
        for part, label in strokes:
            slab.paint(part, label, grain)
        slab.hu += _noise(slab.hu.shape, noise_hu, noise_rng)
        hu[first:last] = np.clip(np.rint(slab.hu), *HU_RANGE)
    return CTVolume(hu, grid), LabelMap(labels, grid, chosen)


def planning_geometry() -> VolumeGeometry:
    """The grid of a planning CT of head and neck, 178 x 512 x 512, its isocentre in the middle of the top slice."""
    z, y, x = PLANNING_SHAPE
    dx, dy, dz = PLANNING_SPACING
    return VolumeGeometry(PLANNING_SHAPE, PLANNING_SPACING, (-dx * (x - 1) / 2, -dy * (y - 1) / 2, -dz * (z - 1)))


def draw_person(rng: np.random.Generator) -> Person:
    """Organs within human ranges, left and right never the same."""
    parotid, submandibular, sinus = rng.uniform(0.88, 1.12), rng.uniform(0.94, 1.04), rng.uniform(0.9, 1.0)
    uneven = rng.uniform(0.03, 0.07) * rng.choice((LEFT, RIGHT))
    return Person(
        fat_mm=float(rng.uniform(4, 12)),
        parotid_size=(parotid + uneven, parotid - uneven),
        parotid_hu=float(rng.uniform(-15, 40)),
        submandibular_size=(submandibular - uneven, submandibular + uneven),
        maxillary_sinus=(sinus, sinus * 0.8) if rng.random() < 0.5 else (sinus * 0.8, sinus),
        frontal_side=int(rng.choice((LEFT, RIGHT))),
        filled_side=int(rng.choice((LEFT, RIGHT))),
        jaw_size=float(rng.uniform(0.92, 1.08)),
        jaw_turn=float(rng.uniform(-3, 3)),
        larynx_size=float(rng.uniform(0.9, 1.1)),
        blood_hu=float(rng.choice((46, rng.uniform(90, 180)))),
    )


def draw_posture(rng: np.random.Generator) -> Posture:
    """Size and pose within what planning CTs show."""
    size = rng.uniform(0.95, 1.05)
    x, y, z = size * rng.uniform(0.97, 1.03, 3)
    flexion, turn, tilt, roll = np.radians(rng.uniform((-10, -6, -2, -2), (8, 6, 2, 2))).tolist()
    dx, dy, dz = rng.uniform((-12, -10, -4), (12, 10, 0)).tolist()
    waves = rng.uniform(*WAVE_LIMITS, (4, 4)).tolist()
    return Posture(
        head_scale=(x, y, z),
        trunk_scale=float(size * rng.uniform(0.93, 1.05)),
        neck_scale=float(size * rng.uniform(0.88, 1.12)),
        flexion=flexion,
        turn=turn,
        tilt=tilt,
        roll=roll,
        shift=(dx, dy, dz),
        waves=tuple((amplitude, k, m, phase) for amplitude, k, m, phase in waves),
    )


def _slabs(shape: Index) -> Iterator[tuple[int, int]]:
    step = max(1, SLAB_VOXELS // (shape[1] * shape[2]))
    return ((first, min(first + step, shape[0])) for first in range(0, shape[0], step))


def _scan_positions(grid: VolumeGeometry) -> tuple[Millimetres, Millimetres, Millimetres]:
    """x and y from the scan's middle, and the depth under its top face, of columns, rows and slices, mm."""
    slices, rows, columns = grid.shape
    dx, dy, dz = grid.spacing
    x, y = (np.arange(columns) - (columns - 1) / 2) * dx, (np.arange(rows) - (rows - 1) / 2) * dy
    return x, y, (slices - 0.5 - np.arange(slices)) * dz


def _anatomy_coordinates(grid: VolumeGeometry, posture: Posture, first: int, last: int) -> list[Array]:
    """Where the voxel centres of slices first:last lie in the anatomy's frame: x, y, z, each float32 (z, y, x).

    Sizes and angles change along z only: each slice is carried over by one affine map, and by the waves.
    """
    x, y, depth = _scan_positions(grid)
    dx, dy, dz = posture.shift
    z = _z_from_depth(depth[first:last] + dz, posture)
    headward = _smooth_step(z, *NECK_Z)[:, None]
    scale_x, scale_y = (posture.trunk_scale + headward * (s - posture.trunk_scale) for s in posture.head_scale[:2])
    u = (x - dx - PIVOT[0]) / scale_x  # (slice, column)
    v = (y - dy + BODY_CENTRE_Y - PIVOT[1]) / scale_y  # (slice, row)
    w = (z - PIVOT[2])[:, None]
    rotation = _rotations(posture, headward[:, 0])[..., None]  # (slice, 3, 3, 1)
    of_rows = [rotation[:, i, 1] * v + rotation[:, i, 2] * w + PIVOT[i] for i in range(3)]
    of_columns = [rotation[:, i, 0] * u for i in range(3)]
    of_rows[0] += _displacement(posture.waves[::2], v, w)
    of_columns[1] += _displacement(posture.waves[1::2], u, w)
    return [
        c.astype(np.float32)[:, None, :] + r.astype(np.float32)[:, :, None]
        for c, r in zip(of_columns, of_rows, strict=True)
    ]


def _z_from_depth(depth: Millimetres, posture: Posture) -> Millimetres:
    """The anatomy's z at so many mm under the scan's top: head, neck and trunk each have their own scale."""
    above = 500.0
    knots = np.array((VERTEX_Z + above, VERTEX_Z, NECK_Z[1], NECK_Z[0], NECK_Z[0] - 1000))
    scales = np.array((posture.head_scale[2], posture.head_scale[2], posture.neck_scale, posture.trunk_scale))
    depths = np.concatenate(([0.0], np.cumsum(-np.diff(knots) * scales))) - above * scales[0]
    return np.interp(depth, depths, knots)


def _rotations(posture: Posture, headward: Millimetres) -> Millimetres:
    """For each slice the matrix that turns the scan back into the anatomy, (slice, 3, 3)."""
    whole = _rotation("y", np.array(posture.tilt)) @ _rotation("z", np.array(posture.roll))
    return _rotation("z", -posture.turn * headward) @ _rotation("x", -posture.flexion * headward) @ whole


def _rotation(axis: str, angle: Millimetres) -> Millimetres:
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.broadcast_to(np.eye(3), (*angle.shape, 3, 3)).copy()
    matrix[..., i, i] = matrix[..., j, j] = np.cos(angle)
    matrix[..., j, i], matrix[..., i, j] = np.sin(angle), -np.sin(angle)
    return matrix


def _smooth_step(z: Millimetres, low: float, high: float) -> Millimetres:
    share = np.clip((z - low) / (high - low), 0, 1)
    return share * share * (3 - 2 * share)


def _displacement(waves: tuple[Wave, ...], across: Millimetres, along: Millimetres) -> Millimetres:
    total = np.zeros_like(across)
    for amplitude, k, m, phase in waves:
        total += amplitude * np.sin(k * across + m * along + phase)
    return total


def _couch_slice(grid: VolumeGeometry, posture: Posture, rng: np.random.Generator) -> Array:
    """float32 HU (1, y, x): the couch under the patient's back, in air; it is the same in every slice."""
    x, y, _ = _scan_positions(grid)
    shape = (1, y.size, x.size)
    coordinates = [np.broadcast_to(c, shape).astype(np.float32) for c in (x, y[:, None], np.zeros(1))]
    back = PIVOT[1] - BODY_CENTRE_Y + (BACK_Y - PIVOT[1]) * posture.trunk_scale + posture.shift[1]
    slab = _Slab(coordinates, np.full(shape, AIR, np.float32), np.zeros(shape, np.uint8), grid.spacing)
    slab.paint(couch_part(x=rng.uniform(-15, 15), y=back + rng.uniform(3, 8)))
    return slab.hu


class _Slab:
    """Some slices of the scan while they are painted: `hu`, float32 (z, y, x), and their labels."""

    def __init__(self, coordinates: list[Array], background: Array, labels: LabelArray, spacing: Point) -> None:
        self.hu = np.broadcast_to(background, labels.shape).copy()
        self._labels = labels
        self._coordinates = coordinates
        self._softness = np.float32(np.prod(spacing) ** (1 / 3))  # mm over which an edge is spread: a voxel's width
        self._steps = tuple(max(1, round(SEARCH_STEP_MM / s)) for s in spacing[::-1])
        # How far, along any axis of the anatomy, a voxel lies from its lattice point: turned, scaled and waved.
        self._reach = 1.6 * max((n - 1) * s for n, s in zip(self._steps, spacing[::-1], strict=True))
        nz, ny, nx = self._steps
        self._lattice = [np.ascontiguousarray(c[::nz, ::ny, ::nx]) for c in coordinates]
        self._extent = [(float(c.min()), float(c.max())) for c in self._lattice]

    def paint(self, part: Part, label: int = 0, grain: Array | None = None) -> None:
        """Blend the part's layers into `hu`, by how much of each voxel they fill; set `label` inside, unless 0."""
        margin = float(self._softness) / 2 - min((depth for depth, _ in part.layers), default=0.0)
        box = self._box(part.shape, margin)
        if box is None:
            return
        distance = self._distance(part.shape, box, margin)
        if part.layers:
            self._blend(part, box, distance, grain)
        if label:
            self._labels[box][distance < 0] = label

    def _blend(self, part: Part, box: Box, distance: Array, grain: Array | None) -> None:
        depth, value = part.layers[0]
        outermost = inner = self._share_deeper(distance, depth)
        painted = outermost * np.float32(value)
        for (_, above), (depth, value) in pairwise(part.layers):
            inner = self._share_deeper(distance, depth)
            painted += inner * np.float32(value - above)
        if part.grain and grain is not None:
            painted += inner * np.float32(part.grain) * _grain_at([c[box] for c in self._coordinates], grain)
        hu = self.hu[box]
        hu *= np.float32(1) - outermost
        hu += painted

    def _share_deeper(self, distance: Array, depth: float) -> Array:
        """What share of each voxel lies deeper than `depth` mm under the surface, 0 to 1."""
        share = np.float32(0.5) - (distance + np.float32(depth)) / self._softness
        np.clip(share, 0, 1, out=share)
        return share

    def _distance(self, shape: Shape, box: Box, margin: float) -> Array:
        if not isinstance(shape, Union):
            x, y, z = (c[box] for c in self._coordinates)
            return shape.distance(x, y, z)
        distance = np.full(self._labels[box].shape, np.float32(1e3))
        for member in shape.shapes:
            inner = self._box(member, margin)
            if inner is not None:
                inset = tuple(slice(i.start - b.start, i.stop - b.start) for i, b in zip(inner, box, strict=True))
                np.minimum(distance[inset], self._distance(member, inner, margin), out=distance[inset])
        return distance

    def _box(self, shape: Shape, margin: float) -> Box | None:
        """A box of all voxels within `margin` mm of the shape; None where the slab has none."""
        low, high = shape.bounds()
        limits = [(a - margin - self._reach, b + margin + self._reach) for a, b in zip(low, high, strict=True)]
        if any(a > top or b < bottom for (a, b), (bottom, top) in zip(limits, self._extent, strict=True)):
            return None
        near = np.ones(self._lattice[0].shape, dtype=bool)
        for c, (a, b) in zip(self._lattice, limits, strict=True):
            near &= (c > a) & (c < b)
        box = []
        for axis, (step, size) in enumerate(zip(self._steps, self._labels.shape, strict=True)):
            hits = np.flatnonzero(near.any(axis=tuple(a for a in range(3) if a != axis)))
            if not hits.size:
                return None
            box.append(slice(int(hits[0]) * step, min(size, (int(hits[-1]) + 1) * step)))
        return box[0], box[1], box[2]


def _grain_block(rng: np.random.Generator) -> Array:
    """float32 cube of unit variance whose opposite faces fit together: tissue texture, repeated through the body."""
    block = rng.standard_normal((GRAIN_SIDE,) * 3, dtype=np.float32)
    for axis in range(3):
        block += 0.5 * (np.roll(block, 1, axis) + np.roll(block, -1, axis))
    block /= block.std()
    return block


def _grain_at(coordinates: list[Array], grain: Array) -> Array:
    x, y, z = ((c * np.float32(1 / GRAIN_STEP_MM)).astype(np.int32) & (GRAIN_SIDE - 1) for c in coordinates)
    return grain.take((z * GRAIN_SIDE + y) * GRAIN_SIDE + x)


def _noise(shape: tuple[int, ...], deviation: float, rng: np.random.Generator) -> Array:
    """Gaussian noise, float32 (z, y, x), of that standard deviation in HU, correlated between neighbours in a slice."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    noise[:, 1:] += np.float32(0.5) * noise[:, :-1]
    noise[:, :, 1:] += np.float32(0.5) * noise[:, :, :-1]
    noise *= np.float32(deviation / 1.25)  # each of the two sums multiplied the variance by 1 + 1/4
    return noise
