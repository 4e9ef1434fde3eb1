"""Cases in memory -> training samples: crops and augmentation, drawn on the device that learns.

Zhu et al., section 3.1: affine and elastic, in plane and the same on every slice. That is augmentation = "in-plane";
"volumetric" also stretches and tilts along the slices, and changes sharpness and grey values.
"""

from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from anatomynet.engine.config import ModelConfig, TrainConfig
from anatomynet.engine.data import Case
from anatomynet.engine.geometry import Index
from anatomynet.engine.network import normalised_from_hu
from anatomynet.engine.structures import mirrored_labels
from anatomynet.engine.volume import LabelArray

# In plane.
LARGEST_ROTATION = np.radians(12)
SCALES = (0.85, 1.2)
ELASTIC_NODES = 5
ELASTIC_SHIFT = 0.03  # of the crop's side, one standard deviation
ELASTIC_SHARE = 0.3
CONTRASTS = (0.9, 1.1)
BRIGHTNESS = 0.06  # of the window's half width
LARGEST_NOISE = 0.05
# In the volume, besides: how a neck is bent, how long it is, and how a scanner reconstructs.
LARGEST_PITCH = np.radians(12)  # chin up or down
LARGEST_ROLL = np.radians(6)  # ear to shoulder
SLICE_SCALES = (0.8, 1.25)
ASPECT = 0.05  # of width and depth apart, one standard deviation of their logarithm
GREY_SHARE = 0.4
SMOOTHINGS = (-0.4, 0.8)  # share of the neighbours' mean in a voxel; below 0 it is sharpened
LARGEST_GAMMA = 0.3  # logarithm
VOLUMETRIC_NOISE = 0.1
FOREGROUND_SHARE = 0.8  # of crops are centred on a structure's voxel
# Of the side of a crop as the region finder's, one standard deviation: OpenKBP's 33 validation patients have its boxes
# 0.04 (z), 0.08 (y) and 0.05 (x) of the median side off the middle of their contours, which are not of all structures.
REGION_SHIFT = 0.06

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Sample:
    """One training step's input: float32 (1, 1, z, y, x), int64 (z, y, x), and what is annotated."""

    image: Tensor
    target: Tensor
    annotated: tuple[bool, ...]


class Augmentation:
    """Draws samples from cases that are cut to the body; each step's randomness hangs on the seed and the step.

    Cases stay on the device once they were drawn from: 170 of OpenKBP's take 0.4 GB.
    """

    def __init__(self, model: ModelConfig, train: TrainConfig, device: torch.device | str = "cpu") -> None:
        self.model = model
        self.train = train
        self.device = torch.device(device)
        self._mirrored = mirrored_labels(model.structures)
        self._mirror = torch.tensor(self._mirrored, device=self.device)
        self._held: WeakKeyDictionary[Case, _Held] = WeakKeyDictionary()

    def draw(self, case: Case, around: int | None = None, *, random: np.random.Generator) -> Sample:
        """One augmented sample: the whole body box, a box as the region finder's, or a crop around a structure.

        That is the one of label `around`, if given; the boxes hold them all.
        """
        held = self._hold(case)
        centre, size = self._place(held, around, random)
        view = _View(centre, size, flipped=bool(random.random() < 0.5))
        noise = torch.Generator(self.device).manual_seed(int(random.integers(2**62)))
        if self.train.augmentation == "volumetric":
            view = view.inside(case.labels.shape)
            image, target = self._sampled(held, _volumetric_grid(view, held, random))
            image = _other_greys(image, random, noise)
        else:
            image, target = self._sampled_in_plane(held, view, random)
            image = image * random.uniform(*CONTRASTS) + random.normal(0, BRIGHTNESS)
            image = _noisy(image, random.uniform(0, LARGEST_NOISE), noise)
        annotated = case.annotated
        if view.flipped:
            target = self._mirror[target]
            # A structure without its partner in the model: what lies there now has no contours.
            annotated = tuple(label > 0 and annotated[label - 1] for label in self._mirrored[1:])
        return Sample(image.clamp(-1, 1)[None, None], target, annotated)

    def _place(self, held: "_Held", around: int | None, random: np.random.Generator) -> tuple[Vector, tuple[int, ...]]:
        """Centre and size, voxels (z, y, x), of what a sample shows."""
        train, sides = self.train, tuple(held.labels.shape)
        chance = random.random()  # one for both shares: a step that sees neither is as it is without them
        if chance < train.whole_share:
            return np.array(sides) / 2, sides
        if chance < train.whole_share + train.region_share:
            return held.region_centre(train.region_crop, random), self._crop_size(train.region_crop, sides)
        return held.crop_centre(around, random), self._crop_size(train.crop, sides)

    def _crop_size(self, crop: Index, sides: tuple[int, ...]) -> tuple[int, ...]:
        """Of a crop's own size also where the case is smaller, there is air around: a GPU records that size alone."""
        depth, height, width = crop
        return (depth if self.train.augmentation == "volumetric" else min(depth, sides[0]), height, width)

    def _hold(self, case: Case) -> "_Held":
        held = self._held.get(case)
        if held is None:
            held = self._held[case] = _Held.from_case(case, self.device)
        return held

    def _sampled_in_plane(self, held: "_Held", view: "_View", random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Image and labels (z, y, x), moved in plane, the same on every slice."""
        depth = view.size[0]
        first = int(np.clip(round(view.centre[0] - depth / 2), 0, held.hu.shape[0] - depth))
        slices = slice(first, first + depth)
        grid = _in_plane_grid(view, held.hu.shape[1:], random).to(self.device)
        # Air is made 0, for that is what grid_sample finds outside.
        image = normalised_from_hu(held.hu[slices], self.model.hu_window)[None] + 1
        image = F.grid_sample(image, grid, align_corners=False)[0] - 1
        target = F.grid_sample(held.labels[slices].float()[None], grid, mode="nearest", align_corners=False)[0].long()
        return image, target

    def _sampled(self, held: "_Held", grid: Tensor) -> tuple[Tensor, Tensor]:
        """Image and labels (z, y, x), where a grid of the volume says."""
        image = normalised_from_hu(held.hu, self.model.hu_window)[None, None] + 1
        image = F.grid_sample(image, grid, align_corners=False)[0, 0] - 1
        labels = held.labels.float()[None, None]
        return image, F.grid_sample(labels, grid, mode="nearest", align_corners=False)[0, 0].long()


class _View(NamedTuple):
    """Which box of a case a sample shows: its centre and its size in voxels (z, y, x), and whether it is mirrored."""

    centre: Vector
    size: tuple[int, ...]
    flipped: bool

    def inside(self, sides: tuple[int, ...]) -> "_View":
        """Moved so that no more air than must be is seen, as it is in the box that serving computes."""
        half = np.minimum(self.size, sides) / 2
        return self._replace(centre=np.clip(self.centre, half, np.array(sides) - half))


@dataclass(frozen=True, eq=False)
class _Held:
    """A case, ready to be drawn from: int16 and uint8 (z, y, x) on the device, and where its structures are."""

    hu: Tensor
    labels: Tensor
    spacing: tuple[float, ...]  # mm, z y x
    voxels: dict[int, NDArray[np.int64]]  # by label, in the flattened volume
    middle: Vector  # of all that is labelled, z y x
    box_middle: Vector  # of the box around it

    @staticmethod
    def from_case(case: Case, device: torch.device) -> "_Held":
        voxels = _voxels_by_label(case.labels)
        marked = np.concatenate([np.empty(0, np.int64), *voxels.values()])
        body_middle = np.array(case.labels.shape) / 2  # where nothing is labelled
        places = np.unravel_index(marked, case.labels.shape)
        return _Held(
            torch.from_numpy(case.volume.hu).to(device),
            torch.from_numpy(case.labels).to(device),
            case.volume.geometry.spacing[::-1],
            voxels,
            np.array([np.mean(side) for side in places]) if voxels else body_middle,
            np.array([(side.min() + side.max() + 1) / 2 for side in places]) if voxels else body_middle,
        )

    def crop_centre(self, around: int | None, random: np.random.Generator) -> Vector:
        """A voxel (z, y, x): mostly one of a structure, that of label `around` or each as likely as another."""
        if self.voxels and random.random() < FOREGROUND_SHARE:
            label = around if around in self.voxels else int(random.choice(list(self.voxels)))
            voxel = random.choice(self.voxels[label])
            centre = np.array(np.unravel_index(voxel, self.labels.shape), dtype=np.float64)
            # In plane the structures lie around the spine: half way to their common centre keeps most of them in sight.
            centre[1:] = (centre[1:] + self.middle[1:]) / 2
            return centre
        return random.uniform(0, self.labels.shape)

    def region_centre(self, crop: Index, random: np.random.Generator) -> Vector:
        """A point (z, y, x) near the middle of the box around all contours, which is what the region finder looks for.

        To ask the finder itself would hang training on another checkpoint, which may not know its structures.
        """
        return self.box_middle + random.normal(0, REGION_SHIFT, 3) * crop


def _voxels_by_label(labels: LabelArray) -> dict[int, NDArray[np.int64]]:
    marked = np.flatnonzero(labels)
    of_each = labels.ravel()[marked]
    return {int(label): marked[of_each == label] for label in np.unique(of_each)}


def _in_plane_grid(view: _View, source: tuple[int, ...], random: np.random.Generator) -> Tensor:
    """Where each pixel (y, x) of a crop comes from, as grid_sample wants it: float32 (1, y, x, 2)."""
    angle = random.uniform(-LARGEST_ROTATION, LARGEST_ROTATION)
    scale = random.uniform(*SCALES)
    size = view.size[1:]
    y, x = np.meshgrid(*(np.arange(side) + 0.5 - side / 2 for side in size), indexing="ij")
    if random.random() < ELASTIC_SHARE:
        nodes = random.normal(0, ELASTIC_SHIFT, (1, 2, ELASTIC_NODES, ELASTIC_NODES)).astype(np.float32)
        shift = F.interpolate(torch.from_numpy(nodes), size, mode="bicubic", align_corners=True)[0].numpy()
        y, x = y + shift[0] * size[0], x + shift[1] * size[1]
    if view.flipped:
        x = -x
    source_y = (np.cos(angle) * y - np.sin(angle) * x) / scale + view.centre[1]
    source_x = (np.sin(angle) * y + np.cos(angle) * x) / scale + view.centre[2]
    grid = np.stack((source_x * 2 / source[1] - 1, source_y * 2 / source[0] - 1), axis=-1)
    return torch.from_numpy(grid.astype(np.float32))[None]


def _volumetric_grid(view: _View, held: _Held, random: np.random.Generator) -> Tensor:
    """Where each voxel of a crop comes from, as grid_sample wants it: float32 (1, z, y, x, 3) on the case's device."""
    device, size = held.hu.device, view.size
    axes = [torch.arange(side, device=device) + (0.5 - side / 2) for side in size]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    if random.random() < ELASTIC_SHARE:
        nodes = random.normal(0, ELASTIC_SHIFT, (1, 3, *[ELASTIC_NODES] * 3)).astype(np.float32)
        shift = F.interpolate(torch.from_numpy(nodes).to(device), size, mode="trilinear", align_corners=True)[0]
        offsets = offsets + shift * torch.tensor(size, device=device).reshape(3, 1, 1, 1)
    to_source = _volumetric_affine(held.spacing, flipped=view.flipped, random=random)
    sides = np.array(held.hu.shape)
    # grid_sample: -1 to 1 from edge to edge, x first.
    matrix = (to_source * 2 / sides[:, None])[::-1]
    shift_to = (view.centre * 2 / sides - 1)[::-1]
    grid = torch.tensor(matrix.astype(np.float32), device=device) @ offsets.reshape(3, -1)
    grid = grid + torch.tensor(shift_to.astype(np.float32), device=device)[:, None]
    return grid.T.reshape(1, *size, 3)


def _volumetric_affine(spacing: tuple[float, ...], *, flipped: bool, random: np.random.Generator) -> Vector:
    """(3, 3): an offset from a crop's centre, in voxels (z, y, x), -> the offset in the case that is shown there."""
    turn = random.uniform(-LARGEST_ROTATION, LARGEST_ROTATION)
    pitch = random.uniform(-LARGEST_PITCH, LARGEST_PITCH)
    roll = random.uniform(-LARGEST_ROLL, LARGEST_ROLL)
    rotation = _rotation(1, 2, turn) @ _rotation(0, 1, pitch) @ _rotation(0, 2, roll)
    scales = np.array([random.uniform(*SLICE_SCALES), *[random.uniform(*SCALES)] * 2])
    scales[1:] *= np.exp(random.normal(0, ASPECT, 2))
    mm = np.array(spacing)
    sign = np.array([1.0, 1.0, -1.0 if flipped else 1.0])
    matrix: Vector = rotation * (mm * sign / scales) / mm[:, None]
    return matrix


def _rotation(first: int, second: int, angle: float) -> Vector:
    """(3, 3), in the plane of two axes of (z, y, x)."""
    matrix = np.eye(3)
    matrix[[first, second], [first, second]] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def _other_greys(image: Tensor, random: np.random.Generator, noise: torch.Generator) -> Tensor:
    """The image (z, y, x) as another scanner and kernel might show it."""
    if random.random() < GREY_SHARE:
        mean = F.avg_pool3d(image[None, None], 3, stride=1, padding=1, count_include_pad=False)[0, 0]
        image = image.lerp(mean, random.uniform(*SMOOTHINGS))
    image = image * random.uniform(*CONTRASTS) + random.normal(0, BRIGHTNESS)
    if random.random() < GREY_SHARE:
        gamma = float(np.exp(random.uniform(-LARGEST_GAMMA, LARGEST_GAMMA)))
        image = ((image + 1) / 2).clamp(0, 1) ** gamma * 2 - 1
    return _noisy(image, random.uniform(0, VOLUMETRIC_NOISE), noise)


def _noisy(image: Tensor, largest: float, noise: torch.Generator) -> Tensor:
    return image + torch.randn(image.shape, generator=noise, device=image.device) * largest
