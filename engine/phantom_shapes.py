"""The phantom's vocabulary of shapes: ellipsoid, tube, loft, half-space, and what is made of them.

Stands between the table of anatomy (engine.phantom_anatomy) and the painter (engine.phantom). A shape knows the box
it fits in and the signed distance, in mm and first-order exact, of any point to its surface: below zero inside.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Triple = tuple[float, float, float]
FAR = 1e4  # mm: beyond every scan
TABLE_STEP_MM = 0.5  # a loft's sections are looked up at this step: finer than any voxel
TINY = np.float32(1e-6)


class Shape(ABC):
    """A solid in the anatomy's frame, LPS mm."""

    @abstractmethod
    def bounds(self) -> tuple[Triple, Triple]:
        """The lowest and the highest (x, y, z) of a box around the shape, mm."""

    @abstractmethod
    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """Signed distance to the surface in mm, float32, of points given as three arrays of one shape."""

    @abstractmethod
    def mirrored(self) -> "Shape":
        """The same shape on the patient's other side: x becomes -x."""


@dataclass(frozen=True)
class Ellipsoid(Shape):
    """An ellipsoid with its axes along x, y and z; `boxy` takes fourth powers in place of squares."""

    centre: Triple
    radii: Triple
    boxy: bool = False

    def bounds(self) -> tuple[Triple, Triple]:
        """See Shape."""
        return _triple(np.subtract(self.centre, self.radii)), _triple(np.add(self.centre, self.radii))

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """See Shape."""
        offsets = [
            (p - np.float32(c)) / np.float32(r) for p, c, r in zip((x, y, z), self.centre, self.radii, strict=True)
        ]
        return _distance_from_norm(offsets, list(np.array(self.radii, dtype=np.float32)), boxy=self.boxy)

    def mirrored(self) -> "Ellipsoid":
        """See Shape."""
        x, y, z = self.centre
        return Ellipsoid((-x, y, z), self.radii, self.boxy)


@dataclass(frozen=True)
class Tube(Shape):
    """A tapered tube with round ends along a polyline.

    Attributes:
        knots: two or more rows (x, y, z, radius), mm, of the polyline.
        stretch: of the tube's thickness along x, y, z: (1, 1, 2) is a tube twice as tall as thick.
    """

    knots: tuple[tuple[float, float, float, float], ...]
    stretch: Triple = (1.0, 1.0, 1.0)

    def bounds(self) -> tuple[Triple, Triple]:
        """See Shape."""
        rows = np.array(self.knots)
        reach = np.outer(rows[:, 3], self.stretch)
        return _triple((rows[:, :3] - reach).min(axis=0)), _triple((rows[:, :3] + reach).max(axis=0))

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """See Shape."""
        stretch = np.array(self.stretch, dtype=np.float32)
        point = [p / s if s != 1 else p for p, s in zip((x, y, z), stretch, strict=True)]
        rows = (np.array(self.knots) / (*self.stretch, 1)).astype(np.float32)
        d = _distance_from_segment(point, rows[0], rows[1], stretch)
        for i in range(1, len(rows) - 1):
            np.minimum(d, _distance_from_segment(point, rows[i], rows[i + 1], stretch), out=d)
        return d

    def mirrored(self) -> "Tube":
        """See Shape."""
        return Tube(tuple((-x, y, z, r) for x, y, z, r in self.knots), self.stretch)


@dataclass(frozen=True)
class Loft(Shape):
    """A stack of axial ellipses, linear between them, with flat ends: how physicians draw a tubular organ.

    Attributes:
        sections: rows (z, centre x, centre y, radius x, radius y), mm, in any order of z.
        boxy: fourth powers in place of squares.
    """

    sections: tuple[tuple[float, float, float, float, float], ...]
    boxy: bool = False
    _table: Array = field(init=False, repr=False, compare=False)
    _bottom: float = field(init=False, repr=False, compare=False)
    _top: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = np.array(sorted(self.sections))
        levels = np.arange(rows[0, 0], rows[-1, 0] + TABLE_STEP_MM, TABLE_STEP_MM)
        table = np.stack([np.interp(levels, rows[:, 0], rows[:, i]) for i in range(1, 5)]).astype(np.float32)
        object.__setattr__(self, "_table", table)
        object.__setattr__(self, "_bottom", float(rows[0, 0]))
        object.__setattr__(self, "_top", float(rows[-1, 0]))

    def bounds(self) -> tuple[Triple, Triple]:
        """See Shape."""
        x, y, rx, ry = self._table
        low = (float((x - rx).min()), float((y - ry).min()), self._bottom)
        return low, (float((x + rx).max()), float((y + ry).max()), self._top)

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """See Shape."""
        level = ((z - np.float32(self._bottom)) * np.float32(1 / TABLE_STEP_MM) + np.float32(0.5)).astype(np.int32)
        np.clip(level, 0, self._table.shape[1] - 1, out=level)
        centre_x, centre_y, radius_x, radius_y = (row.take(level) for row in self._table)
        offsets = [(x - centre_x) / radius_x, (y - centre_y) / radius_y]
        d = _distance_from_norm(offsets, [radius_x, radius_y], boxy=self.boxy)
        np.maximum(d, z - np.float32(self._top), out=d)
        return np.maximum(d, np.float32(self._bottom) - z, out=d)

    def mirrored(self) -> "Loft":
        """See Shape."""
        return Loft(tuple((z, -x, y, rx, ry) for z, x, y, rx, ry in self.sections), self.boxy)


@dataclass(frozen=True)
class HalfSpace(Shape):
    """All that lies behind a plane; `normal` points out of it."""

    point: Triple
    normal: Triple

    def bounds(self) -> tuple[Triple, Triple]:
        """See Shape."""
        return (-FAR, -FAR, -FAR), (FAR, FAR, FAR)

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """See Shape."""
        normal = (np.array(self.normal) / np.linalg.norm(self.normal)).astype(np.float32)
        d: Array = x * normal[0] + y * normal[1] + z * normal[2] - np.float32(normal @ np.array(self.point))
        return d

    def mirrored(self) -> "HalfSpace":
        """See Shape."""
        (x, y, z), (nx, ny, nz) = self.point, self.normal
        return HalfSpace((-x, y, z), (-nx, ny, nz))


@dataclass(frozen=True)
class Common(Shape):
    """What all of some shapes have in common; its box is that of the first."""

    shapes: tuple[Shape, ...]

    def bounds(self) -> tuple[Triple, Triple]:
        """See Shape."""
        return self.shapes[0].bounds()

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """See Shape."""
        d = self.shapes[0].distance(x, y, z)
        for shape in self.shapes[1:]:
            np.maximum(d, shape.distance(x, y, z), out=d)
        return d

    def mirrored(self) -> "Common":
        """See Shape."""
        return Common(tuple(shape.mirrored() for shape in self.shapes))


@dataclass(frozen=True)
class Union(Shape):
    """Some shapes as one. The painter visits each in its own box."""

    shapes: tuple[Shape, ...]

    def bounds(self) -> tuple[Triple, Triple]:
        """See Shape."""
        boxes = np.array([shape.bounds() for shape in self.shapes])
        return _triple(boxes[:, 0].min(axis=0)), _triple(boxes[:, 1].max(axis=0))

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """See Shape."""
        d = self.shapes[0].distance(x, y, z)
        for shape in self.shapes[1:]:
            np.minimum(d, shape.distance(x, y, z), out=d)
        return d

    def mirrored(self) -> "Union":
        """See Shape."""
        return Union(tuple(shape.mirrored() for shape in self.shapes))


def _distance_from_norm(offsets: list[Array], radii: list[Array], *, boxy: bool) -> Array:
    """First-order distance to the surface norm(offsets) = 1: (norm - 1) / |gradient of norm|."""
    powers = [u * u for u in offsets]
    if boxy:
        slopes = [p * u for p, u in zip(powers, offsets, strict=True)]
        powers = [p * p for p in powers]
    else:
        slopes = offsets
    total = sum(powers[1:], start=powers[0])
    norm = np.sqrt(np.sqrt(total)) if boxy else np.sqrt(total)
    steep: list[Array] = [s / r for s, r in zip(slopes, radii, strict=True)]
    gradient = np.sqrt(sum((s * s for s in steep[1:]), start=steep[0] * steep[0]))
    lever = total / (norm + TINY)  # norm ** (power - 1)
    d: Array = (norm - np.float32(1)) * lever / (gradient + TINY)
    # At the very centre the gradient vanishes: the smallest radius is the depth there.
    np.copyto(d, -_smallest(radii), where=norm < np.float32(0.05))
    return d


def _smallest(radii: list[Array]) -> Array:
    smallest = radii[0]
    for r in radii[1:]:
        smallest = np.minimum(smallest, r)
    return smallest


def _distance_from_segment(point: list[Array], start: Array, end: Array, stretch: Array) -> Array:
    """In mm to the tapered capsule between two rows (x, y, z, radius); points and rows lack the stretch."""
    along = end - start
    offsets = [p - c for p, c in zip(point, start[:3], strict=True)]
    share = offsets[0] * along[0] + offsets[1] * along[1] + offsets[2] * along[2]
    share *= np.float32(1) / np.maximum(along[:3] @ along[:3], TINY)
    np.clip(share, 0, 1, out=share)
    squares = [(o - share * a) ** 2 for o, a in zip(offsets, along, strict=False)]
    length = np.sqrt(squares[0] + squares[1] + squares[2])
    d: Array = length - (start[3] + share * along[3])
    if (stretch != 1).any():  # first order: divided by the gradient that the stretch leaves
        steep = np.sqrt(sum(q / (s * s) for q, s in zip(squares, stretch, strict=True)))
        d *= (length + TINY) / (steep + TINY)
    return d


def _triple(values: NDArray[np.float64]) -> Triple:
    x, y, z = np.asarray(values, dtype=np.float64).tolist()
    return (x, y, z)
