"""How the region finder learns: cases -> its checkpoint. `python -m anatomynet.engine.train_region --data DIR`.

    training_case   physicians' contours and what a checkpoint draws, in one mask: what is not annotated is there too
    sample_of       other scan ranges, more trunk, other sizes: what other departments scan
    loss_of         a missed voxel costs more than a larger box
    choose_margins  threshold and margin with which the fewest voxels are computed, on the validation patients

It draws on every case first, which takes a few seconds each; the learning itself, minutes.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from anatomynet.engine.boxes import slices_of
from anatomynet.engine.checkpoint import load_checkpoint, save_region_checkpoint
from anatomynet.engine.command import reports_errors
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.data import Case, cut_to_body
from anatomynet.engine.errors import DataError, OutputError
from anatomynet.engine.geometry import Index, Point
from anatomynet.engine.network import normalised_from_hu
from anatomynet.engine.postprocess import drop_strays
from anatomynet.engine.precision import in_bfloat16
from anatomynet.engine.preprocess import body_box, prepare
from anatomynet.engine.region import (
    BOX_FACES,
    Box,
    RegionConfig,
    box_from_coarse,
    coarse_factors,
    coarse_from_hu,
    grown_box,
)
from anatomynet.engine.region_network import RegionNetwork, ServedRegion, box_of, input_from_coarse
from anatomynet.engine.resolution import enlarged
from anatomynet.engine.survey import survey_archive
from anatomynet.engine.train import files_there, phantom_case
from anatomynet.engine.volume import HounsfieldArray

COARSE_SPACING = (8.0, 8.0, 6.0)  # mm (x, y, z)
HU_WINDOW = (-1000.0, 1000.0)
STEPS = 4000
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
LARGEST_GRADIENT = 5.0
SEED = 1808
PHANTOMS = 24
PHANTOM_SHARE = 0.1
# Of what is inside against what is not: the cost of a missed voxel, and of a plane that is thought to miss everything.
VOXEL_WEIGHT = 4.0
PLANE_WEIGHT = 4.0
# What `choose_margins` tries.
THRESHOLDS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0)
MARGINS = ((0, 0, 0), (0, 1, 1), (1, 1, 1))

CUT_SHARE = 0.4  # of samples lose slices above and below
LEAST_MM = 80.0  # of which this much is left
TRUNK_SHARE = 0.3  # of scans with shoulders get more trunk
SHOULDERS_MM = 350.0  # a wider body shows them
LONGEST_TRUNK_MM = 300.0  # as far as the diaphragm
REPEATED_MM = (15.0, 50.0)  # of the lowest slices, repeated there and back
SIDES_SHARE = 0.2  # have their sides moved
LARGEST_MOVE_MM = 24.0
SCALES = (0.85, 1.2)
UNEVEN = 0.07  # of the scale, along each axis for itself
CONTRASTS = (0.9, 1.1)
BRIGHTNESS = 0.04  # of the window, one standard deviation
LARGEST_NOISE = 0.04  # of the window

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class RegionCase:
    """What is learnt from.

    Attributes:
        hu: int16 (z, y, x), a CT at the network's resolution, cut to the body.
        inside: bool (z, y, x), where any structure is.
        spacing: mm (x, y, z).
    """

    hu: HounsfieldArray
    inside: Mask
    spacing: Point


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What is chosen by: a validation patient as serving sees it.

    Attributes:
        coarse: int16 (z, y, x), what the finder is given.
        factors: voxels (z, y, x) in each of its own.
        shape: of the body box, voxels (z, y, x).
        first, last: of the box that what is drawn fills, in voxels (z, y, x); last is exclusive.
    """

    coarse: HounsfieldArray
    factors: Index
    shape: Index
    first: NDArray[np.float64]
    last: NDArray[np.float64]


def drawn_mask(case: Case, network: nn.Module, model: ModelConfig) -> Mask:
    """Where a network draws any structure, bool (z, y, x) on the case's grid."""
    start, stop = body_box(case.volume.hu, in_plane_stride=1)
    body = slices_of(start, stop)
    image = normalised_from_hu(torch.from_numpy(case.volume.hu[body]), model.hu_window)[None, None]
    with torch.inference_mode(), in_bfloat16("cpu"):  # a target needs no more
        drawn = network(image)[0].argmax(dim=0).to(torch.uint8).numpy()
    mask = np.zeros(case.labels.shape, np.bool_)
    mask[body] = drop_strays(drawn) > 0
    return mask


def training_case(case: Case, drawn: Mask) -> RegionCase:
    """What is learnt from a case: the physicians' contours, and what is drawn where they did not contour."""
    complete = ((case.labels > 0) | drawn).astype(np.uint8)
    body = cut_to_body(dataclasses.replace(case, labels=complete))
    return RegionCase(body.volume.hu, body.labels > 0, body.volume.geometry.spacing)


def phantoms_like(cases: Sequence[RegionCase], model: ModelConfig) -> list[RegionCase]:
    """Phantoms at the spacings of the cases, every structure known."""
    spacings = [cases[seed % len(cases)].spacing for seed in range(PHANTOMS)]
    phantoms = [phantom_case(model, spacing=spacing, seed=seed) for seed, spacing in enumerate(spacings)]
    return [RegionCase(one.volume.hu, one.labels > 0, one.volume.geometry.spacing) for one in phantoms]


def held_out_case(case: Case, drawn: Mask, model: ModelConfig, config: RegionConfig) -> HeldOut:
    """A case as the served model is given it, enlarged to full resolution, and where it draws.

    Raises:
        DataError: it draws nothing there.
    """
    if not drawn.any():
        raise DataError(f"{case.name}: the checkpoint draws nothing there, so no box can be chosen by it")
    given = prepare(enlarged(case.volume, model.in_plane_stride), model)
    factors, (depth, height, width) = coarse_factors(given.grid.spacing, config), given.hu.shape
    voxels = np.argwhere(drawn)
    scale = np.divide(given.grid.shape, case.labels.shape)
    first, last = voxels.min(axis=0) * scale - given.start, (voxels.max(axis=0) + 1) * scale - given.start
    return HeldOut(coarse_from_hu(given.hu, factors), factors, (depth, height, width), first, last)


def sample_of(case: RegionCase, config: RegionConfig, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """An augmented case at the coarse spacing: the network's input, 1 where a structure is; both (1, 1, z, y, x)."""
    hu, inside = case.hu, case.inside
    x, y, z = case.spacing
    if random.random() < CUT_SHARE:
        kept = _kept_slices(hu.shape[0], z, random)
        hu, inside = hu[kept], inside[kept]
    if hu.shape[2] * x > SHOULDERS_MM and random.random() < TRUNK_SHARE:
        order = _slices_with_more_trunk(hu.shape[0], z, random)
        hu, inside = hu[order], inside[order]
    if random.random() < SIDES_SHARE:
        hu, inside = _with_sides_moved(hu, inside, round(LARGEST_MOVE_MM / x), random)
    if random.random() < 0.5:
        hu, inside = hu[:, :, ::-1], inside[:, :, ::-1]
    scale = random.uniform(*SCALES) * random.uniform(1 - UNEVEN, 1 + UNEVEN, 3) / config.coarse_spacing[::-1]
    shape = np.maximum(1, np.rint(np.array(hu.shape) * scale * (z, y, x))).astype(int).tolist()
    image, target = (torch.from_numpy(np.ascontiguousarray(array)).float()[None, None] for array in (hu, inside))
    image = _as_another_scanner(F.adaptive_avg_pool3d(image, shape)[0, 0], config, random)
    given, target = input_from_coarse(image, config), F.adaptive_max_pool3d(target, shape)
    pad = [n for new, old in zip(given.shape[:1:-1], target.shape[:1:-1], strict=True) for n in (0, new - old)]
    return given, F.pad(target, pad)


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each voxel, and of each plane along each axis: whether it goes through a structure."""
    loss = _cross_entropy(logits, target, VOXEL_WEIGHT)
    for others in ((3, 4), (2, 4), (2, 3)):
        loss = loss + _cross_entropy(logits.amax(others), target.amax(others), PLANE_WEIGHT) / 3
    return loss


def learn(
    cases: Sequence[RegionCase], phantoms: Sequence[RegionCase], config: RegionConfig, steps: int
) -> RegionNetwork:
    """The whole training: one augmented case a step."""
    torch.manual_seed(SEED)
    network = RegionNetwork()
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    losses: list[float] = []
    with tqdm(range(steps), unit="step") as bar:
        for step in bar:
            random = np.random.default_rng((SEED, step))
            source = phantoms if random.random() < PHANTOM_SHARE else cases
            given, target = sample_of(source[int(random.integers(len(source)))], config, random)
            with in_bfloat16("cpu"):
                logits = network(given.contiguous(memory_format=torch.channels_last_3d))
            loss = loss_of(logits.float(), target)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT)
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
            bar.set_postfix(loss=f"{np.mean(losses[-200:]):.3f}")
    return network.eval()


def choose_margins(
    network: RegionNetwork, config: RegionConfig, held_out: Sequence[HeldOut], model: ModelConfig
) -> RegionConfig:
    """The threshold and margin with which the fewest voxels are computed: a box that has to grow is drawn twice."""
    served = ServedRegion(network, config)
    with torch.inference_mode():
        logits = [served.logits(torch.from_numpy(case.coarse)) for case in held_out]
    tried = []
    for threshold, margin in itertools.product(THRESHOLDS, MARGINS):
        boxes = [
            box_from_coarse(
                box_of(found > threshold, margin).numpy(),
                case.factors,
                case.shape,
                in_plane_stride=model.in_plane_stride,
            )
            for case, found in zip(held_out, logits, strict=True)
        ]
        grown = [_grown(box, case, model.in_plane_stride) for box, case in zip(boxes, held_out, strict=True)]
        shares = [_share(box, case) for box, case in zip(boxes, held_out, strict=True)]
        again = [_share(box, case) if box else 0.0 for box, case in zip(grown, held_out, strict=True)]
        computed = float(np.mean(shares) + np.mean(again))
        click.echo(
            f"threshold {threshold:4.1f}, margin {margin}: share of the body box {np.mean(shares):.3f}, median "
            f"{np.median(shares):.3f}, worst {max(shares):.3f}; {np.count_nonzero(again)} of {len(again)} grow; "
            f"computed {computed:.3f}"
        )
        tried.append((computed, dataclasses.replace(config, threshold=threshold, margin=margin)))
    return min(tried, key=lambda pair: pair[0])[1]


def _grown(box: Box, case: HeldOut, in_plane_stride: int) -> Box | None:
    """What `segment` makes of a box, in voxels (z, y, x) of the case, that a drawn structure touches; None where none
    does.
    """
    width = (1, in_plane_stride, in_plane_stride)
    low = (case.first < np.add(box.start, width)) & (np.array(box.start) > 0)
    high = (case.last > np.subtract(box.stop, width)) & (np.array(box.stop) < case.shape)
    faces = tuple(
        face
        for pair, reached in zip(BOX_FACES, zip(low, high, strict=True), strict=True)
        for face, yes in zip(pair, reached, strict=True)
        if yes
    )
    return grown_box(box, faces, case.shape) if faces else None


def _share(box: Box, case: HeldOut) -> float:
    return float(np.prod(np.subtract(box.stop, box.start)) / math.prod(case.shape))


def _kept_slices(depth: int, z_mm: float, random: np.random.Generator) -> slice:
    length = int(random.integers(min(depth, math.ceil(LEAST_MM / z_mm)), depth + 1))
    first = int(random.integers(0, depth - length + 1))
    return slice(first, first + length)


def _slices_with_more_trunk(depth: int, z_mm: float, random: np.random.Generator) -> NDArray[np.intp]:
    """Of a scan's slices, in which order: the lowest ones go on there and back, below what was scanned."""
    period = int(np.clip(round(random.uniform(*REPEATED_MM) / z_mm), 2, depth))
    added = round(random.uniform(0, LONGEST_TRUNK_MM) / z_mm)
    below = np.resize(np.concatenate((np.arange(period), np.arange(period)[::-1])), added)
    return np.concatenate((below[::-1], np.arange(depth)))


def _with_sides_moved(
    hu: HounsfieldArray, inside: Mask, largest: int, random: np.random.Generator
) -> tuple[HounsfieldArray, Mask]:
    """More air at the sides, or less of the body, as in a narrow field of view."""
    moves = random.integers(-largest, largest + 1, (2, 2)).tolist()
    pads = [(0, 0), *((max(0, a), max(0, b)) for a, b in moves)]
    cut = (slice(None), *(slice(max(0, -a), -max(0, -b) or None) for a, b in moves))
    return np.pad(hu, pads, constant_values=math.floor(HU_WINDOW[0]))[cut], np.pad(inside, pads)[cut]


def _as_another_scanner(image: Tensor, config: RegionConfig, random: np.random.Generator) -> Tensor:
    """Other contrast and brightness of what is not air, and noise."""
    low, high = config.hu_window
    share = (image.clamp(low, high) - low) / (high - low)
    share = share * random.uniform(*CONTRASTS) + random.normal(0, BRIGHTNESS) * (share > BRIGHTNESS)
    noise = torch.from_numpy(random.standard_normal(tuple(image.shape), dtype=np.float32))
    return (share + noise * random.uniform(0, LARGEST_NOISE)) * (high - low) + low


def _cross_entropy(logits: Tensor, target: Tensor, weight: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, pos_weight=logits.new_tensor(weight))


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder with train/ and validation/.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Whose drawing completes the contours; the shipped."
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/region.safetensors"), show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=STEPS, show_default=True)
@click.option("--overwrite", is_flag=True, help="Lose the file that is at --output, if there is one.")
@reports_errors
def main(data: Path, checkpoint: Path | None, output: Path, steps: int, overwrite: bool) -> None:
    """Train the region finder for a checkpoint's structures on a folder of annotated CTs."""
    network, model = load_checkpoint(checkpoint)
    config = RegionConfig(model.structures, COARSE_SPACING, HU_WINDOW, threshold=0.0, margin=(0, 0, 0))
    if files_there(output) and not overwrite:
        raise OutputError(f"{output} is there: give --overwrite to lose it, or another --output")
    train, validation = (
        [(case, drawn_mask(case, network, model)) for case in tqdm(survey.cases, desc="drawing", unit="case")]
        for survey in survey_archive(data, model)
    )
    held_out = [held_out_case(*pair, model, config) for pair in validation]  # now: what is refused is, before it learns
    cases = [training_case(*pair) for pair in train]
    finder = learn(cases, phantoms_like(cases, model), config, steps)
    config = choose_margins(finder, config, held_out, model)
    save_region_checkpoint(output, finder, config)
    click.echo(f"{output}: threshold {config.threshold}, margin {config.margin} coarse voxels (z, y, x)")


if __name__ == "__main__":
    main()
