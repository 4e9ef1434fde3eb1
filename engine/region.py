"""The region finder: in which box of the body head and neck lie, so that only that is sent and computed.

body box -> averaged to voxels of about 6 x 8 x 8 mm -> a small network -> the box of the structures

The paper's authors cropped their CTs by hand (Zhu et al., section 2.1). A found box is a guess: where a drawn structure
touches a face that is not the body box's own, `segment` lets the box grow there.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.config import ModelConfig, Vector, config_from_json
from anatomynet.engine.errors import ModelError
from anatomynet.engine.geometry import Index, Point
from anatomynet.engine.preprocess import BOX_STEP, POOLING, NetworkInput
from anatomynet.engine.structures import structures_by_name
from anatomynet.engine.volume import HounsfieldArray, LabelArray

if TYPE_CHECKING:
    from anatomynet.engine.runtime import Runtime

# Of each axis z, y, x: at its start, and at its stop.
BOX_FACES = (("lower", "upper"), ("front", "back"), ("right", "left"))
# No box of head and neck is smaller: what is, was not found but guessed.
SMALLEST_BOX_MM = 40.0


@dataclass(frozen=True)
class RegionConfig:
    """What a region finder was trained for; it travels with its weights.

    Attributes:
        structures: names of those whose box it finds.
        coarse_spacing: mm (x, y, z) that it was trained at; voxels are averaged to come near it.
        hu_window: Hounsfield units mapped to 0..1, clipped outside; the lower end is air.
        threshold: logit above which a coarse voxel counts.
        margin: coarse voxels (z, y, x) around what counts.
        checkpoint_sha256: of the safetensors file, empty before it is written; never stored inside that file.
    """

    structures: tuple[str, ...]
    coarse_spacing: Vector
    hu_window: tuple[float, float]
    threshold: float
    margin: tuple[int, int, int]
    checkpoint_sha256: str = ""

    def __post_init__(self) -> None:
        structures_by_name(self.structures)
        if not all(0 < side < math.inf for side in self.coarse_spacing):
            raise ModelError(f"coarse_spacing of the region finder: expected above 0 mm, found {self.coarse_spacing}")
        if not -math.inf < self.hu_window[0] < self.hu_window[1] < math.inf or min(self.margin) < 0:
            raise ModelError(
                f"region finder: expected hu_window low < high and margin of 0 or more, found {self.hu_window} and "
                f"{self.margin}"
            )

    def to_json(self) -> str:
        """One line of JSON; `region_config_from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def region_config_from_json(text: str) -> RegionConfig:
    """What RegionConfig.to_json wrote.

    Raises:
        ModelError: text that is not such JSON.
    """
    return config_from_json(RegionConfig, text, "the region finder's configuration")


class RegionFinder(Protocol):
    """Anything that computes the served model `anatomynet_region`."""

    @property
    def config(self) -> RegionConfig:
        """What it was trained for."""
        ...

    def find(self, coarse: HounsfieldArray) -> NDArray[np.int64]:
        """The box of the structures in a coarse CT.

        Args:
            coarse: int16 (z, y, x), Hounsfield units, axes as a Runtime's; voxels near `config.coarse_spacing`.

        Returns:
            int64 (6,): start z, y, x and stop z, y, x in coarse voxels, half-open; six zeros where nothing was found.

        Raises:
            GeometryError: an array of another type, an empty one, or one that is too large.
            ModelError, ServerError: it could not be computed.
        """
        ...


@dataclass(frozen=True)
class Box:
    """A part of a volume, in voxels (z, y, x); stop is exclusive."""

    start: Index
    stop: Index


def finder_of(runtime: "Runtime") -> RegionFinder | None:
    """The region finder that a runtime brings with it, where it knows every structure of the runtime's model."""
    finder: RegionFinder | None = getattr(runtime, "region_finder", None)
    known = finder.config.structures if finder else ()
    return finder if set(runtime.model.structures) <= set(known) else None


def find_box(given: NetworkInput, model: ModelConfig, finder: RegionFinder) -> Box | None:
    """The box in `given.hu` that holds what a model draws; None where none was found, or an implausible one.

    Its start is a multiple of 2 in z and of 2 x stride in plane; its sides are multiples of BOX_STEP where they fit.

    Raises:
        ModelError, ServerError: the finder fails.
    """
    factors = coarse_factors(given.grid.spacing, finder.config)
    coarse = coarse_from_hu(given.hu, factors)
    if not coarse.size:
        return None
    found = finder.find(coarse)
    if found.shape != (6,) or (found[:3] < 0).any() or (found[3:] > coarse.shape).any():
        return None
    smallest = np.minimum(SMALLEST_BOX_MM / np.multiply(given.grid.spacing[::-1], factors), coarse.shape)
    if (found[3:] - found[:3] < smallest).any():
        return None
    return box_from_coarse(found, factors, given.shape, in_plane_stride=model.in_plane_stride)


def box_from_coarse(found: NDArray[np.int64], factors: Index, shape: Index, *, in_plane_stride: int) -> Box:
    """A finder's answer in voxels of a volume, rounded outwards; see `find_box`.

    Args:
        found: int64 (6,), start z, y, x and stop z, y, x in coarse voxels, half-open, as a RegionFinder returns it.
        factors: voxels (z, y, x) in a coarse one.
        shape: of the volume, voxels (z, y, x).
        in_plane_stride: a voxel of the network's is so many wide.
    """
    scales = (1, in_plane_stride, in_plane_stride)
    sides = [
        _side(first, last, factor=factor, size=size, unit=POOLING * scale, multiple=step * scale)
        for first, last, factor, size, scale, step in zip(
            found[:3].tolist(), found[3:].tolist(), factors, shape, scales, BOX_STEP, strict=True
        )
    ]
    return _box([a for a, _ in sides], [b for _, b in sides])


def touched_faces(labels: LabelArray, box: Box, shape: Index, *, in_plane_stride: int) -> tuple[str, ...]:
    """The faces of a box (BOX_FACES) that a structure reaches and that are not the volume's own: it may be cut there.

    Args:
        labels: uint8 (z, y, x), what was drawn in the box.
        box: its place.
        shape: of the volume.
        in_plane_stride: a voxel of the network's is so many wide.
    """
    touched = []
    for axis, (first, last, size, width) in enumerate(
        zip(box.start, box.stop, shape, (1, in_plane_stride, in_plane_stride), strict=True)
    ):
        along = np.moveaxis(labels, axis, 0)
        if first > 0 and along[:width].any():
            touched.append(BOX_FACES[axis][0])
        if last < size and along[-width:].any():
            touched.append(BOX_FACES[axis][1])
    return tuple(touched)


def grown_box(box: Box, faces: tuple[str, ...], shape: Index) -> Box:
    """The box with these faces moved out to the volume's own."""
    start = [0 if low in faces else first for first, (low, _) in zip(box.start, BOX_FACES, strict=True)]
    stop = [size if high in faces else last for last, size, (_, high) in zip(box.stop, shape, BOX_FACES, strict=True)]
    return _box(start, stop)


def coarse_factors(spacing: Point, config: RegionConfig) -> Index:
    """How many voxels (z, y, x) of a spacing (x, y, z) mm are averaged to come near the trained coarse spacing."""
    x, y, z = (max(1, round(coarse / own)) for coarse, own in zip(config.coarse_spacing, spacing, strict=True))
    return (z, y, x)


def coarse_from_hu(hu: HounsfieldArray, factors: Index) -> HounsfieldArray:
    """Means of blocks of fewer than 65,536 voxels, int16 (z, y, x), rounded down; what is left over at the far end is
    left out."""
    depth, height, width = (side // factor for side, factor in zip(hu.shape, factors, strict=True))
    fz, fy, fx = factors
    blocks = hu[: depth * fz, : height * fy, : width * fx].reshape(depth, fz, height, fy, width * fx)
    # Along x last, and by einsum: seven times as fast as all at once.
    rows = np.add.reduce(blocks, axis=(1, 3), dtype=np.int32)
    total = np.einsum("zyxk->zyx", rows.reshape(depth, height, width, fx))
    means: HounsfieldArray = (total // math.prod(factors)).astype(np.int16)
    return means


def _side(first: int, last: int, *, factor: int, size: int, unit: int, multiple: int) -> tuple[int, int]:
    """One side of a box, from coarse voxels to voxels: rounded outwards, as far on the one side as on the other."""
    # What is left over beyond the last coarse voxel goes with it.
    low, high = first * factor, size if last == size // factor else last * factor
    length = -(-(high - low // unit * unit) // multiple) * multiple
    if length >= size:
        return 0, size
    # The first of the starts that reach `high`, and the last that is not beyond `low`; between them, the middle.
    earliest, latest = max(0, -(-(high - length) // unit)), low // unit
    start = (earliest + latest + 1) // 2 * unit
    return start, min(size, start + length)


def _box(start: Sequence[int], stop: Sequence[int]) -> Box:
    (z0, y0, x0), (z1, y1, x1) = start, stop
    return Box((z0, y0, x0), (z1, y1, x1))
