"""Cases on disk -> training samples: the PDDCA / MICCAI 2015 layout, what is annotated, crops and augmentation.

case/img.nrrd                    Hounsfield units
case/structures/BrainStem.nrrd   a mask a structure; no file means not annotated, never absent
"""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from anatomynet.engine.config import ModelConfig, TrainConfig
from anatomynet.engine.errors import DataError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.network import normalised_from_hu
from anatomynet.engine.preprocess import body_box
from anatomynet.engine.structures import mirrored_labels
from anatomynet.engine.volume import CTVolume, LabelArray

# Augmentation, in plane and the same on every slice (section 3.1 of Zhu et al.: affine and elastic).
LARGEST_ROTATION = np.radians(12)
SCALES = (0.85, 1.2)
ELASTIC_NODES = 5
ELASTIC_SHIFT = 0.03  # of the crop's side, one standard deviation
ELASTIC_SHARE = 0.3
CONTRASTS = (0.9, 1.1)
BRIGHTNESS = 0.06  # of the window's half width
LARGEST_NOISE = 0.05
FOREGROUND_SHARE = 0.8  # of crops are centred on a structure's voxel
SPACES_LPS = ("left-posterior-superior", "LPS")  # as NRRD spells it
SPACING_TOLERANCE = 0.01  # of a mask's, against the CT's


@dataclass(frozen=True, eq=False)
class Case:
    """One annotated CT.

    Attributes:
        name: of its folder.
        volume: the CT.
        labels: uint8 (z, y, x) on the CT's grid, i + 1 for structure i; 0 where nothing that is known.
        annotated: for each structure, whether its contours exist.
    """

    name: str
    volume: CTVolume
    labels: LabelArray
    annotated: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """One training step's input: float32 (1, 1, z, y, x), int64 (z, y, x), and what is annotated."""

    image: Tensor
    target: Tensor
    annotated: tuple[bool, ...]


def find_cases(folder: Path) -> list[Path]:
    """The case folders in `folder`, by name.

    Raises:
        DataError: none there.
    """
    cases = sorted(path.parent for path in folder.glob("*/img.nrrd"))
    if not cases:
        raise DataError(f"no case in {folder}: expected folders with img.nrrd and structures/*.nrrd (the PDDCA layout)")
    return cases


def read_case(folder: Path, structures: tuple[str, ...]) -> Case:
    """Reads one case of the PDDCA layout.

    Raises:
        DataError: a file that is not NRRD, axes that are not LPS, a mask of another grid, or no known structure.
    """
    hu, geometry = _read_nrrd(folder / "img.nrrd")
    if not np.isfinite(hu).all():
        raise DataError(f"{folder / 'img.nrrd'}: expected finite Hounsfield units, found NaN or infinity")
    labels = np.zeros(hu.shape, np.uint8)
    annotated = []
    for label, name in enumerate(structures, start=1):
        path = folder / "structures" / f"{name}.nrrd"
        annotated.append(path.is_file())
        if path.is_file():
            mask, mask_geometry = _read_nrrd(path)
            if mask.shape != hu.shape:
                raise DataError(f"{path}: expected the CT's shape {hu.shape} (z, y, x), found {mask.shape}")
            if not np.allclose(mask_geometry.spacing, geometry.spacing, rtol=SPACING_TOLERANCE):
                raise DataError(
                    f"{path}: expected the CT's spacing {geometry.spacing} mm, found {mask_geometry.spacing}"
                )
            labels[mask > 0] = label
    if not any(annotated):
        raise DataError(f"{folder}: none of {', '.join(structures)} in its structures/")
    volume = CTVolume(np.clip(np.rint(hu), -32768, 32767).astype(np.int16), geometry)
    return Case(folder.name, volume, labels, tuple(annotated))


def network_grid_config(config: ModelConfig) -> ModelConfig:
    """The same model for CTs that come at the network's resolution, as training cases do: stride 1."""

    def coarser(spacing: tuple[float, float, float]) -> tuple[float, float, float]:
        x, y, z = spacing
        return (x * config.in_plane_stride, y * config.in_plane_stride, z)

    return replace(
        config,
        in_plane_stride=1,
        smallest_spacing=coarser(config.smallest_spacing),
        largest_spacing=coarser(config.largest_spacing),
    )


def cut_to_body(case: Case) -> Case:
    """The case without the air around the patient: the box that serving computes, at the network's resolution."""
    start, stop = body_box(case.volume.hu, in_plane_stride=1)
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    volume = CTVolume(np.ascontiguousarray(case.volume.hu[box]), case.volume.geometry.cropped(start, stop))
    return Case(case.name, volume, np.ascontiguousarray(case.labels[box]), case.annotated)


class Augmentation:
    """Draws samples from cases that are cut to the body; each step's randomness hangs on the seed and the step."""

    def __init__(self, model: ModelConfig, train: TrainConfig) -> None:
        self.model = model
        self.train = train
        self.mirror = torch.tensor(mirrored_labels(model.structures))

    def draw(self, case: Case, random: np.random.Generator) -> Sample:
        """One augmented sample: a crop around a structure, or the whole body box."""
        whole = random.random() < self.train.whole_share
        size = case.labels.shape if whole else np.minimum(self.train.crop, case.labels.shape)
        centre = np.array(case.labels.shape) / 2 if whole else _crop_centre(case.labels, random)
        depth, height, width = (int(side) for side in size)
        first = int(np.clip(round(centre[0] - depth / 2), 0, case.labels.shape[0] - depth))
        hu = torch.from_numpy(case.volume.hu[first : first + depth])
        labels = torch.from_numpy(case.labels[first : first + depth])
        grid, flipped = _in_plane_grid(centre[1:], (height, width), case.labels.shape[1:], random)
        # Air is made 0, for that is what grid_sample finds outside.
        image = normalised_from_hu(hu, self.model.hu_window)[None] + 1
        image = F.grid_sample(image, grid, align_corners=False) - 1
        target = F.grid_sample(labels.float()[None], grid, mode="nearest", align_corners=False)[0].long()
        image = image * random.uniform(*CONTRASTS) + random.normal(0, BRIGHTNESS)
        noise = torch.from_numpy(random.standard_normal(image.shape, dtype=np.float32))
        image = (image + noise * random.uniform(0, LARGEST_NOISE)).clamp(-1, 1)
        annotated = case.annotated
        if flipped:
            target = self.mirror[target]
            # A structure without its partner in the model: what lies there now has no contours.
            annotated = tuple(label > 0 and annotated[label - 1] for label in self.mirror[1:].tolist())
        return Sample(image[None], target, annotated)


def _crop_centre(labels: LabelArray, random: np.random.Generator) -> NDArray[np.float64]:
    """A voxel (z, y, x): mostly one of a structure, each structure as likely as another."""
    present = np.unique(labels)[1:]
    if len(present) and random.random() < FOREGROUND_SHARE:
        voxels = np.flatnonzero(labels == random.choice(present))
        centre = np.array(np.unravel_index(random.choice(voxels), labels.shape), dtype=np.float64)
        # In plane the structures lie around the spine: half way to their common centre keeps most of them in sight.
        common = np.array([np.mean(side) for side in np.nonzero(labels)])
        centre[1:] = (centre[1:] + common[1:]) / 2
        return centre
    return random.uniform(0, labels.shape)


def _in_plane_grid(
    centre: NDArray[np.float64], size: tuple[int, int], source: tuple[int, ...], random: np.random.Generator
) -> tuple[Tensor, bool]:
    """Where each pixel (y, x) of a crop comes from, as grid_sample wants it, and whether left and right changed."""
    angle = random.uniform(-LARGEST_ROTATION, LARGEST_ROTATION)
    scale = random.uniform(*SCALES)
    flipped = bool(random.random() < 0.5)
    y, x = np.meshgrid(*(np.arange(side) + 0.5 - side / 2 for side in size), indexing="ij")
    if random.random() < ELASTIC_SHARE:
        nodes = random.normal(0, ELASTIC_SHIFT, (1, 2, ELASTIC_NODES, ELASTIC_NODES)).astype(np.float32)
        shift = F.interpolate(torch.from_numpy(nodes), size, mode="bicubic", align_corners=True)[0].numpy()
        y, x = y + shift[0] * size[0], x + shift[1] * size[1]
    if flipped:
        x = -x
    source_y = (np.cos(angle) * y - np.sin(angle) * x) / scale + centre[0]
    source_x = (np.sin(angle) * y + np.cos(angle) * x) / scale + centre[1]
    grid = np.stack((source_x * 2 / source[1] - 1, source_y * 2 / source[0] - 1), axis=-1)
    return torch.from_numpy(grid.astype(np.float32))[None], flipped


def _read_nrrd(path: Path) -> tuple[NDArray[Any], VolumeGeometry]:
    """One NRRD volume as (z, y, x), with its geometry."""
    import nrrd

    try:
        array, header = nrrd.read(str(path), index_order="C")
    # pynrrd lets zlib's error through, and StopIteration where the file is empty.
    except (OSError, nrrd.NRRDError, ValueError, EOFError, StopIteration, zlib.error) as error:
        raise DataError(f"{path} is not a readable NRRD file: {error or type(error).__name__}") from error
    space, directions = header.get("space"), np.asarray(header.get("space directions", np.nan), dtype=np.float64)
    along_axes = array.ndim == 3 and directions.shape == (3, 3) and (np.diag(directions) > 0).all()
    if (
        space not in SPACES_LPS
        or not along_axes
        or not np.allclose(directions, np.diag(np.diag(directions)), atol=1e-6)
    ):
        raise DataError(
            f"{path}: expected three axes along {SPACES_LPS[0]}, found {array.ndim} in {space}, "
            f"space directions {directions.tolist()}"
        )
    x, y, z = np.diag(directions).tolist()
    origin_x, origin_y, origin_z = np.asarray(header.get("space origin", np.zeros(3)), dtype=np.float64).tolist()
    depth, height, width = array.shape
    return array, VolumeGeometry((depth, height, width), (x, y, z), (origin_x, origin_y, origin_z))
