"""An anthropomorphic synthetic head-and-neck CT with every structure known: for training, tests and the demonstration.

    Person, Posture   what a seed draws: organs and their asymmetry; size, neck, turn of the head
    parts_of(person)  the table of anatomy (engine.phantom_anatomy), shapes in mm
    paint             parts over one another, slab by slab, each in its own box only
    add_noise         what a scanner adds

Every shape is evaluated in mm at the voxel centres, after the posture has carried these back into the anatomy's
frame: the anatomy does not depend on the grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.errors import GeometryError
from anatomynet.engine.geometry import ALIGNED_COSINE, IDENTITY, VolumeGeometry
from anatomynet.engine.phantom_anatomy import AIR, LEFT, RIGHT, VERTEX_Z, Part, Person, parts_of
from anatomynet.engine.phantom_shapes import Array, Shape, Union
from anatomynet.engine.structures import STRUCTURES, structures_by_name
from anatomynet.engine.volume import CTVolume, LabelArray, LabelMap

PLANNING_SHAPE = (178, 512, 512)
PLANNING_SPACING = (0.9765625, 0.9765625, 2.0)  # a 500 mm field of view; carina to vertex
SLAB_VOXELS = 2_100_000  # coordinates of one slab stay in the processor's cache
SEARCH_STEP_MM = 8.0  # of the lattice on which a shape's box is looked up
GRAIN_SIDE = 32  # voxels of the repeating block of tissue texture
GRAIN_STEP_MM = 1.5
BODY_CENTRE_Y = 25.0  # of the anatomy's frame; lies on the scan's middle
NECK_Z = (-110.0, -10.0)  # over which the trunk's size and position pass into the head's
PIVOT = (0.0, 30.0, -60.0)  # about which the head turns: C5


@dataclass(frozen=True)
class Posture:
    """Size and pose: how the anatomy's frame lies in the scan.

    Attributes:
        head_scale: of the head along x, y, z.
        trunk_scale: of neck and trunk in the axial plane.
        neck_scale: of the neck's length.
        flexion: of the head over the neck, radians; above zero the chin goes down.
        turn: of the head about z, radians; above zero the nose goes to the left.
        tilt: of the whole body about y, as a slope.
        roll: of the whole body about z, radians.
        shift: of the body in the scan, LPS mm.
    """

    head_scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    trunk_scale: float = 1.0
    neck_scale: float = 1.0
    flexion: float = 0.0
    turn: float = 0.0
    tilt: float = 0.0
    roll: float = 0.0
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)


def make_phantom(
    geometry: VolumeGeometry | None = None, *, seed: int = 0, structures: tuple[str, ...] | None = None
) -> tuple[CTVolume, LabelMap]:
    """A synthetic patient, supine, head first, and the truth about it.

    The body lies in the middle of the grid in x and y with its vertex just under the top face, wherever the grid's
    origin is, as a radiographer would set up the scan. The same seed and geometry give the same bytes.

    Args:
        geometry: of the result; its axes must be the patient's. By default 178 x 512 x 512 over 356 x 500 x 500 mm.
        seed: of size, posture, asymmetry, tissue and noise.
        structures: names; label i + 1 is structures[i]. By default all of engine.structures.

    Returns:
        The CT, int16 HU (z, y, x), and its label map, uint8 (z, y, x).

    Raises:
        GeometryError: a grid whose axes are not those of the patient.
        ModelError: a name that is not in the catalogue.
    """
    chosen = structures_by_name(tuple(STRUCTURES) if structures is None else structures)
    grid = _planning_geometry() if geometry is None else geometry
    if not np.diag(np.array(grid.direction)).min() >= ALIGNED_COSINE:
        raise GeometryError(
            f"expected a grid with the direction {IDENTITY}, found {grid.direction}: use its canonical()"
        )
    anatomy_rng, noise_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    person, posture = draw_person(anatomy_rng), draw_posture(anatomy_rng)
    label_of = {s.name: i + 1 for i, s in enumerate(chosen)}
    grain = _grain_block(anatomy_rng)
    hu = np.empty(grid.shape, dtype=np.int16)
    labels = np.zeros(grid.shape, dtype=np.uint8)
    parts = parts_of(person)
    noise_hu = anatomy_rng.uniform(8, 16)
    softness = float(np.prod(grid.spacing) ** (1 / 3))
    for first, last in _slabs(grid.shape):
        coordinates = _anatomy_coordinates(grid, posture, first, last)
        slab = _Slab(coordinates, labels[first:last], softness, grid.spacing)
        for part in parts:
            slab.paint(part, label_of.get(part.label, 0), grain)
        add_noise(slab.hu, noise_hu, noise_rng)
        hu[first:last] = np.clip(np.rint(slab.hu), -1024, 3071)
    return CTVolume(hu, grid), LabelMap(labels, grid, chosen)


def _planning_geometry() -> VolumeGeometry:
    z, y, x = PLANNING_SHAPE
    dx, dy, dz = PLANNING_SPACING
    return VolumeGeometry(PLANNING_SHAPE, PLANNING_SPACING, (-dx * (x - 1) / 2, -dy * (y - 1) / 2, -dz * (z - 1)))


def draw_person(rng: np.random.Generator) -> Person:
    """Organs within human ranges, left and right never the same."""
    parotid = rng.uniform(0.88, 1.12)
    uneven = rng.uniform(0.03, 0.07) * rng.choice((-1, 1))
    submandibular = rng.uniform(0.92, 1.08)
    sinus = rng.uniform(0.9, 1.0)
    return Person(
        fat_mm=float(rng.uniform(4, 12)),
        parotid_size=(parotid + uneven, parotid - uneven),
        parotid_hu=float(rng.uniform(-25, 30)),
        submandibular_size=(submandibular - uneven, submandibular + uneven),
        maxillary_sinus=(sinus, sinus * 0.8) if rng.random() < 0.5 else (sinus * 0.8, sinus),
        filled_side=int(rng.choice((LEFT, RIGHT))),
        jaw_size=float(rng.uniform(0.92, 1.08)),
        jaw_turn=float(rng.uniform(-3, 3)),
        larynx_size=float(rng.uniform(0.9, 1.1)),
        vessel_hu=float(rng.choice((46, rng.uniform(90, 180)))),
        couch=(float(rng.uniform(-15, 15)), float(rng.uniform(0, 8))),
    )


def draw_posture(rng: np.random.Generator) -> Posture:
    """Size and pose within what a planning CT shows."""
    size = rng.uniform(0.95, 1.05)
    x, y, z = size * rng.uniform(0.97, 1.03, 3)
    return Posture(
        head_scale=(x, y, z),
        trunk_scale=float(size * rng.uniform(0.93, 1.05)),
        neck_scale=float(size * rng.uniform(0.88, 1.12)),
        flexion=float(np.radians(rng.uniform(-10, 8))),
        turn=float(np.radians(rng.uniform(-6, 6))),
        tilt=float(np.radians(rng.uniform(-2, 2))),
        roll=float(np.radians(rng.uniform(-2, 2))),
        shift=(float(rng.uniform(-12, 12)), float(rng.uniform(-10, 10)), float(rng.uniform(-4, 0))),
    )


def _slabs(shape: tuple[int, int, int]) -> Iterator[tuple[int, int]]:
    step = max(1, SLAB_VOXELS // (shape[1] * shape[2]))
    return ((first, min(first + step, shape[0])) for first in range(0, shape[0], step))


def _anatomy_coordinates(grid: VolumeGeometry, posture: Posture, first: int, last: int) -> list[Array]:
    """Where the voxel centres of slices first:last lie in the anatomy's frame: x, y, z, each float32 (z, y, x).

    Sizes and angles change along z only, slice by slice: each slice is carried over by one affine map.
    """
    slices, rows, columns = grid.shape
    dx, dy, dz = grid.spacing
    sx, sy, sz = posture.shift
    x = (np.arange(columns) - (columns - 1) / 2) * dx - sx
    y = (np.arange(rows) - (rows - 1) / 2) * dy - sy + BODY_CENTRE_Y
    below_vertex = (slices - 0.5 - np.arange(first, last)) * dz + sz
    z = _z_from_depth(below_vertex, posture)
    headward = _smooth_step(z, *NECK_Z)
    scale_x, scale_y = (posture.trunk_scale + headward * (s - posture.trunk_scale) for s in posture.head_scale[:2])
    rotation = _rotations(posture, headward)  # (slice, 3, 3)
    px, py, pz = PIVOT
    u = (x - px) / scale_x[:, None]
    v = (y - py) / scale_y[:, None]
    coordinates = []
    for i, pivot in enumerate(PIVOT):
        along_x = rotation[:, i, 0, None] * u
        along_y = rotation[:, i, 1, None] * v + (rotation[:, i, 2] * (z - pz))[:, None] + pivot
        coordinates.append(along_x.astype(np.float32)[:, None, :] + along_y.astype(np.float32)[:, :, None])
    return coordinates


def _z_from_depth(below_vertex: NDArray[np.float64], posture: Posture) -> NDArray[np.float64]:
    """The anatomy's z at so many mm under the vertex: head, neck and trunk each have their own scale."""
    knots = np.array((VERTEX_Z + 500, VERTEX_Z, NECK_Z[1], NECK_Z[0], NECK_Z[0] - 1000))
    scales = np.array((posture.head_scale[2], posture.head_scale[2], posture.neck_scale, posture.trunk_scale))
    depths = np.concatenate(([0.0], np.cumsum(-np.diff(knots) * scales))) - 500 * scales[0]
    return np.interp(below_vertex, depths, knots)


def _rotations(posture: Posture, headward: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each slice the matrix (3, 3) that turns the scan back into the anatomy."""
    flexion, turn = posture.flexion * headward, posture.turn * headward
    whole = _rotation("y", np.array(posture.tilt)) @ _rotation("z", np.array(posture.roll))
    return _rotation("z", -turn) @ _rotation("x", -flexion) @ whole


def _rotation(axis: str, angle: NDArray[np.float64]) -> NDArray[np.float64]:
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.broadcast_to(np.eye(3), (*angle.shape, 3, 3)).copy()
    matrix[..., i, i] = matrix[..., j, j] = np.cos(angle)
    matrix[..., j, i] = np.sin(angle)
    matrix[..., i, j] = -np.sin(angle)
    return matrix


def _smooth_step(z: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    share = np.clip((z - low) / (high - low), 0, 1)
    return share * share * (3 - 2 * share)


Box = tuple[slice, slice, slice]


class _Slab:
    """Some slices of the scan while they are painted."""

    def __init__(
        self, coordinates: list[Array], labels: LabelArray, softness: float, spacing: tuple[float, ...]
    ) -> None:
        self.hu = np.full(labels.shape, AIR, dtype=np.float32)
        self._labels = labels
        self._softness = np.float32(softness)
        self._coordinates = coordinates
        self._steps = (1, *(max(1, round(SEARCH_STEP_MM / s)) for s in spacing[1::-1]))
        self._lattice = [np.ascontiguousarray(c[:, :: self._steps[1], :: self._steps[2]]) for c in coordinates]
        self._reach = 1.2 * max(n * s for n, s in zip(self._steps[1:], spacing[1::-1], strict=True))
        self._low = [float(c.min()) for c in coordinates]
        self._high = [float(c.max()) for c in coordinates]

    def paint(self, part: Part, label: int, grain: Array) -> None:
        """Blend the part's layers into `hu`, by how much of each voxel they fill; write its label, if it has one."""
        outermost = min((depth for depth, _ in part.layers), default=0.0)
        margin = float(self._softness) / 2 - outermost
        box = self._box(part.shape, margin)
        if box is None:
            return
        distance = self._distance(part.shape, box, margin)
        if part.layers:
            self._blend(part, box, distance, grain)
        if label:
            self._labels[box][distance < 0] = label

    def _blend(self, part: Part, box: Box, distance: Array, grain: Array) -> None:
        hu = self.hu[box]
        under = 0.0
        painted: Array | None = None
        for depth, value in part.layers:
            share = np.float32(0.5) - (distance + np.float32(depth)) / self._softness
            np.clip(share, 0, 1, out=share)
            if painted is None:
                outer = share
                painted = share * np.float32(value)
            else:
                painted += share * np.float32(value - under)
            under = value
        assert painted is not None
        if part.grain:
            painted += share * np.float32(part.grain) * _grain_at([c[box] for c in self._coordinates], grain)
        hu *= np.float32(1) - outer
        hu += painted

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
        """The voxels that can lie within `margin` mm of the shape; None where the slab has none."""
        low, high = shape.bounds()
        limits = [(a - margin, b + margin) for a, b in zip(low, high, strict=True)]
        if any(a > top or b < bottom for (a, b), bottom, top in zip(limits, self._low, self._high, strict=True)):
            return None
        near = np.ones(self._lattice[0].shape, dtype=bool)
        for c, (a, b) in zip(self._lattice, limits, strict=True):
            near &= (c > a - self._reach) & (c < b + self._reach)
        box = []
        for axis, (step, size) in enumerate(zip(self._steps, self._labels.shape, strict=True)):
            hits = np.flatnonzero(near.any(axis=tuple(a for a in range(3) if a != axis)))
            if not hits.size:
                return None
            box.append(slice(max(0, int(hits[0] - 1) * step + 1), min(size, int(hits[-1] + 1) * step)))
        return box[0], box[1], box[2]


def _grain_block(rng: np.random.Generator) -> Array:
    """float32 cube of unit variance whose opposite faces fit together: tissue texture, repeated through the body."""
    block = rng.standard_normal((GRAIN_SIDE,) * 3, dtype=np.float32)
    for axis in range(3):
        block += 0.5 * (np.roll(block, 1, axis) + np.roll(block, -1, axis))
    return np.ascontiguousarray(block / block.std())


def _grain_at(coordinates: list[Array], grain: Array) -> Array:
    x, y, z = ((c * np.float32(1 / GRAIN_STEP_MM)).astype(np.int32) & (GRAIN_SIDE - 1) for c in coordinates)
    return grain.ravel().take((z * GRAIN_SIDE + y) * GRAIN_SIDE + x)


def add_noise(hu: Array, deviation: float, rng: np.random.Generator) -> None:
    """Add Gaussian noise of that standard deviation, correlated between neighbours in the slice as a CT's is.

    Args:
        hu: float32 (z, y, x), changed in place.
        deviation: HU.
    """
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    noise[:, 1:] += np.float32(0.5) * noise[:, :-1]
    noise[:, :, 1:] += np.float32(0.5) * noise[:, :, :-1]
    noise *= np.float32(deviation / 1.25)
    hu += noise
