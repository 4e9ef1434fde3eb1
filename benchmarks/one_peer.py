"""One study by one way that a user would pick instead, in this process: from DICOM to RTSTRUCT.

    python -m benchmarks.one_peer eager|monai|simple-itk STUDY RESULT.json

benchmarks.peers runs each in a process of its own, as the command runs. The weights are the same; what differs:

    eager       PyTorch on the whole volume, not cut to the body; the rest is ours
    monai       the same, but the network looks through MONAI's sliding window: the CT is averaged 4 x 4 in plane first,
                and the blended logits are interpolated back, as the served graph does; no side of the window is larger
                than the image's, which MONAI would fill with air and compute
    simple-itk  our engine; SimpleITK reads, rt-utils writes
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from anatomynet.client.clock import StageClock
from anatomynet.client.contours import trace_contours
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.study import read_ct_series, volume_from_series
from anatomynet.engine.command import reports_errors
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.preprocess import trained_grid
from anatomynet.engine.runtime import load_runtime
from anatomynet.engine.segment import segment
from anatomynet.engine.structures import structures_by_name
from anatomynet.engine.volume import CTVolume, LabelArray, LabelMap
from benchmarks.simple_itk import read_with_simple_itk, write_with_rt_utils

# As spleen_segmentation_3d of MONAI's tutorials calls sliding_window_inference; the overlap is the function's default.
ROI = (160, 160, 160)
WINDOWS_AT_ONCE = 4
OVERLAP = 0.25


@click.command()
@click.argument("way", type=click.Choice(["eager", "monai", "simple-itk"]))
@click.argument("study", type=click.Path(path_type=Path))
@click.argument("result", type=click.Path(path_type=Path))
@click.option("--roi", type=int, nargs=3, default=ROI, show_default=True, help="Of MONAI's window, z y x.")
@reports_errors
def main(way: str, study: Path, result: Path, roi: tuple[int, int, int]) -> None:
    """Time the stages of one way; the RTSTRUCT lies beside RESULT as .dcm, what PyTorch drew as .npy."""
    clock = StageClock()
    output = result.with_suffix(".dcm")
    output.unlink(missing_ok=True)
    if way == "simple-itk":
        run_simple_itk(study, output, clock)
    else:
        np.save(result.with_suffix(".npy"), run_torch(study, output, clock, roi=roi if way == "monai" else None))
    result.write_text(json.dumps(clock.seconds))


def run_torch(study: Path, output: Path, clock: StageClock, *, roi: tuple[int, int, int] | None) -> LabelArray:
    """PyTorch on the whole volume, through a sliding window of `roi` if there is one."""
    with clock.stage("read"):
        series = read_ct_series(study)
        volume = volume_from_series(series)
    with clock.stage("load"):
        from anatomynet.engine.checkpoint import load_checkpoint

        network, model = load_checkpoint()
        check_taken_as_it_is(volume, model)
    with clock.stage("infer"):
        labels = infer_whole(network.eval(), model, volume, roi)
    with clock.stage("write"):
        label_map = LabelMap(labels, volume.geometry, structures_by_name(model.structures))
        write_rtstruct(output, series, trace_contours(label_map))
    return labels


def infer_whole(network: Any, model: ModelConfig, volume: CTVolume, roi: tuple[int, int, int] | None) -> LabelArray:
    """uint8 (z, y, x) of the whole volume."""
    import torch

    from anatomynet.engine.network import ServedNetwork

    served = ServedNetwork(network, model).eval()
    hu = torch.from_numpy(volume.hu)
    with torch.inference_mode():
        if roi is None:
            label_map = served(hu)[0]
        else:
            from monai.inferers.utils import sliding_window_inference

            x = served.network_input_from_hu(hu)
            window = [min(wanted, side) for wanted, side in zip(roi, x.shape[2:], strict=True)]
            logits: Any = sliding_window_inference(x, window, WINDOWS_AT_ONCE, network, overlap=OVERLAP)
            label_map = served.logits_on_grid(logits, hu.shape).argmax(dim=1)[0].to(torch.uint8)
    labels: LabelArray = label_map.numpy()
    return labels


def run_simple_itk(study: Path, output: Path, clock: StageClock) -> None:
    """SimpleITK, our engine, rt-utils."""
    with clock.stage("read"):
        volume = read_with_simple_itk(study)
    with clock.stage("load"):
        runtime = load_runtime()
    with clock.stage("infer"):
        label_map = segment(volume, runtime)
    with clock.stage("write"):
        write_with_rt_utils(output, study, label_map)


def check_taken_as_it_is(volume: CTVolume, model: ModelConfig) -> None:
    """Whether the network can be shown the voxels without turning or resampling.

    Raises:
        click.ClickException: it cannot.
    """
    canonical = volume.geometry.canonical()
    if canonical != volume.geometry or trained_grid(canonical, model) != canonical:
        raise click.ClickException(
            f"a study of spacing {volume.geometry.spacing} mm and direction {volume.geometry.direction}: expected one "
            f"on its back, head first, at a spacing that {model.name} was trained for"
        )


if __name__ == "__main__":
    main()
