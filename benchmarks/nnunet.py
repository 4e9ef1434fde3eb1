"""nnU-Net v2's own predictor on one study, its default 3d_fullres architecture untrained: a few tiles, in this process.

    python -m benchmarks.nnunet STUDY RESULT.json [--tiles 2]

nnU-Net plans the network itself, from the fingerprint of a data set of which this study is the median case. Its time
does not depend on its weights, so they are random. benchmarks.peers runs this and multiplies. Needs nnunetv2, which is
in no extra of this project: `pip install -c constraints.txt nnunetv2`.
"""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from anatomynet.client.clock import StageClock
from anatomynet.engine.volume import CTVolume
from benchmarks.simple_itk import read_with_simple_itk

DATASET = "Dataset001_HeadAndNeck"
CASES = 40
MIRROR_AXES = (0, 1, 2)  # as its default trainer allows: eight passes a tile
STRUCTURES = 7


@click.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.argument("result", type=click.Path(path_type=Path))
@click.option("--tiles", default=2, show_default=True, help="That are timed.")
def main(study: Path, result: Path, tiles: int) -> None:
    """Time reading, preprocessing and a few tiles."""
    clock = StageClock()
    with clock.stage("read"):
        volume = read_with_simple_itk(study)
    with clock.stage("load"), tempfile.TemporaryDirectory() as home:
        predictor = planned_predictor(volume, Path(home))
    with clock.stage("preprocess"):
        data = preprocessed(predictor, volume)
    patch = [int(side) for side in predictor.configuration_manager.patch_size]
    tile_seconds, timed = time_tiles(predictor, data, patch, tiles)
    found = {
        "seconds": clock.seconds,
        "patch": patch,
        "tiles_timed": timed,
        "tiles_of_the_whole": math.prod(len(steps) for steps in steps_over(predictor, data.shape[1:], patch)),
        "seconds_a_tile": tile_seconds,
        "mirrored_passes": 2 ** len(MIRROR_AXES),
    }
    result.write_text(json.dumps(found))


def planned_predictor(volume: CTVolume, home: Path) -> Any:
    """nnUNetPredictor with the network that its planner makes for such studies."""
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(home / name)
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    description = write_dataset(volume, home)
    plans = PlansManager(planned(volume))
    configuration = plans.get_configuration("3d_fullres")
    network = nnUNetTrainer.build_network_architecture(
        plans, configuration, 1, STRUCTURES + 1, enable_deep_supervision=False
    ).eval()
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(
        network, plans, configuration, [network.state_dict()], description, "nnUNetTrainer", MIRROR_AXES
    )
    return predictor


def write_dataset(volume: CTVolume, home: Path) -> dict[str, Any]:
    """The description and the fingerprint of a data set, as nnUNetv2_plan_and_preprocess leaves them; no image."""
    names = [f"case{k}" for k in range(CASES)]
    description: dict[str, Any] = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{f"structure{k}": k for k in range(1, STRUCTURES + 1)}},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
        "dataset": {name: {"images": [f"{name}.nii.gz"], "label": f"{name}.nii.gz"} for name in names},
    }
    body = volume.hu[volume.hu > -500].astype(np.float64)
    low, median, high = np.percentile(body, (0.5, 50, 99.5)).tolist()
    intensities = {
        "mean": body.mean(), "std": body.std(), "median": median, "percentile_00_5": low, "percentile_99_5": high,
        "min": body.min(), "max": body.max(),
    }  # fmt: skip
    fingerprint = {
        "spacings": [spacing_zyx(volume)] * CASES,
        "shapes_after_crop": [list(volume.hu.shape)] * CASES,
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {"0": intensities},
    }
    for folder, name, content in (
        ("raw", "dataset.json", description),
        ("preprocessed", "dataset_fingerprint.json", fingerprint),
    ):
        path = home / folder / DATASET / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    return description


def planned(volume: CTVolume) -> dict[str, Any]:
    """What its default planner makes of that."""
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    planner = ExperimentPlanner(DATASET)
    planner.lowres_creation_threshold = 0  # 3d_lowres is not asked for, and takes minutes to plan
    plans: dict[str, Any] = planner.plan_experiment()
    return plans


def preprocessed(predictor: Any, volume: CTVolume) -> Any:
    """Cropped, normalised and resampled by its own preprocessor: float (1, z, y, x)."""
    from nnunetv2.inference.data_iterators import PreprocessAdapterFromNpy

    images = PreprocessAdapterFromNpy(
        [volume.hu[None].astype(np.float32)],
        [None],
        [{"spacing": spacing_zyx(volume)}],
        [None],
        predictor.plans_manager,
        predictor.dataset_json,
        predictor.configuration_manager,
        num_threads_in_multithreaded=1,
        verbose=False,
    )
    return next(images)["data"]


def time_tiles(predictor: Any, data: Any, patch: list[int], tiles: int) -> tuple[float, int]:
    """Seconds a tile without mirroring, and how many were timed: a part of the image that has so many, one after one
    tile to warm up."""
    deep = patch[0] + (tiles - 1) * (patch[0] // 2)
    one, several = (data[:, :depth, : patch[1], : patch[2]] for depth in (patch[0], deep))
    predictor.predict_sliding_window_return_logits(one)
    clock = StageClock()
    with clock.stage("tiles"):
        predictor.predict_sliding_window_return_logits(several)
    timed = math.prod(len(steps) for steps in steps_over(predictor, several.shape[1:], patch))
    return clock.seconds["tiles"] / timed, timed


def steps_over(predictor: Any, shape: Any, patch: list[int]) -> list[list[int]]:
    """Where its tiles begin along each axis."""
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

    padded = tuple(max(side, tile) for side, tile in zip(shape, patch, strict=True))
    steps: list[list[int]] = compute_steps_for_sliding_window(padded, tuple(patch), predictor.tile_step_size)
    return steps


def spacing_zyx(volume: CTVolume) -> list[float]:
    """mm, in nnU-Net's order."""
    return list(reversed(volume.geometry.spacing))


if __name__ == "__main__":
    main()
