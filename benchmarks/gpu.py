"""How fast is the whole CT on an NVIDIA GPU, and what makes it so? Forms of the network, a real server, a whole study.

    python -m benchmarks.gpu [--checkpoint FILE] [--slices 178] [--side 512] [--clients 1 --clients 2] [--seconds 100]

    forms     the same network in PyTorch: FP32, FP16, channels last, channels padded to multiples of 8, and
              engine.gpu_runtime's, with and without convolutions and other kernels of its own, with cuDNN's tuning, as
              a CUDA graph; last of all torch.compile, as long as the time lasts; then ONNX Runtime, where it has CUDA
    labels    what the trained checkpoint draws in FP16 that it does not draw in FP32
    served    the real tritonserver with its Python backend, 1, 2 and 4 clients at once over shared memory; where a
              volume's milliseconds go in the server, by its own metrics, and in the client
    study     DICOM to RTSTRUCT through such a server, with the trained checkpoint: random weights would draw noise

A form is timed from INT16 Hounsfield units to labels and confidence, both on the GPU. A part that fails is told in one
line, and the others go on. Prints a table, writes benchmarks/results/gpu.json, after every part.

What the file has of an earlier run stays until it is measured anew, if machine, versions and volume are the same; its
date is under "earlier". `--part study`, once or several times, measures these parts alone, with FP32 again where forms
are held against it. Without it what the file has not comes first, and what it has is measured anew as long as
`--seconds` lasts. Each part is a module of its own, gpu_*.py.

`--device cpu` runs the same lines on a small volume without a GPU, for who changes this script: its times mean nothing.
"""

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from anatomynet.engine.checkpoint import load_checkpoint, save_checkpoint
from anatomynet.engine.config import load_config
from anatomynet.engine.network import AnatomyNet
from benchmarks.common import machine, read_result, table_lines
from benchmarks.gpu_compiled import measure_compiled
from benchmarks.gpu_earlier import FORMS_ELSEWHERE, PARTS, in_order, is_comparable, is_measured, kept_of, without
from benchmarks.gpu_forms import measure_baseline, measure_forms
from benchmarks.gpu_graphs import measure_graphs
from benchmarks.gpu_labels import measure_labels
from benchmarks.gpu_profile import measure_profile
from benchmarks.gpu_runtimes import measure_onnx_runtime, measure_runtime
from benchmarks.gpu_served import measure_served
from benchmarks.gpu_study import coming_study, measure_study
from benchmarks.gpu_trial import Trial, guarded
from benchmarks.served import phantom_hu

SECONDS_HELP = (
    "After which nothing begins that may be left out. What the result's file has not yet comes first; what it has is "
    "measured anew as long as time is left."
)
WANTED = PARTS[:5]  # measured whatever time is left, where the file has them not


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Random weights of oar9's network without.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--slices", default=178, show_default=True)
@click.option("--side", default=512, show_default=True)
@click.option("--repeats", default=5, show_default=True, help="Timed runs each, at most.")
@click.option("--clients", multiple=True, type=int, default=(1, 2, 4), show_default=True)
@click.option("--seconds", default=100.0, show_default=True, help=SECONDS_HELP)
@click.option("--part", "asked", multiple=True, type=click.Choice(PARTS), help="This part alone; may be given again.")
def main(
    checkpoint: Path | None,
    device: str,
    slices: int,
    side: int,
    repeats: int,
    clients: tuple[int, ...],
    seconds: float,
    asked: tuple[str, ...],
) -> None:
    """Compare forms of the network on a GPU, serve one, and draw a study with it."""
    stop = time.monotonic() + seconds
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("no NVIDIA GPU here, or a PyTorch without CUDA; --device cpu tries the script alone")
    torch.backends.cudnn.allow_tf32 = False  # FP32 is what the others are held against
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder, study = Path(temporary), None
        if not asked or "study" in asked:
            study = stack.enter_context(coming_study(folder / "study"))
        given = checkpoint or random_checkpoint(folder / "random.safetensors")
        trial = Trial(given, device, phantom_hu((slices, side, side)), repeats, clients, folder, stop)
        begin(trial, asked)
        measure_parts(trial, study, asked)
        trial.write()
    tell(trial.result)


def begin(trial: Trial, asked: Collection[str]) -> None:
    """Where and of what the result is, and what stays of an earlier one: without `asked` all, until it is replaced."""
    gpu = torch.cuda.get_device_name() if trial.on_gpu else "none: a trial on a CPU"
    config = load_checkpoint(trial.checkpoint)[1]
    trial.result.update(machine=machine() | {"gpu": gpu}, shape=[*trial.hu.shape])
    trial.result.update(model=config.name, stride=config.in_plane_stride, repeats=trial.repeats)
    before = read_result(trial.file)
    if before and not is_comparable(before, trial.result):
        click.echo(
            f"{trial.file}.json is of another machine, version, volume or number of runs, and is replaced", err=True
        )
        return
    trial.result.update(kept_of(before, asked))


def measure_parts(trial: Trial, study: "subprocess.Popen[bytes] | None", asked: Collection[str]) -> None:
    """Those that are asked for, whatever time is left; all, as long as there is time, where none is."""
    measures, order = parts(study), in_order(trial.result, asked)
    if next((part for part in order if part == "forms" or part in FORMS_ELSEWHERE), "forms") != "forms":
        measure_baseline(trial)
    for name in order:
        measured = is_measured(trial.result, name)
        if asked or (name in WANTED and not measured) or time.monotonic() < trial.stop:
            measure_anew(trial, name, measures[name])
        elif not measured:
            trial.result.setdefault("not_measured", {})[name] = "no time was left"


def measure_anew(trial: Trial, name: str, measure: Callable[[Trial], object]) -> None:
    """One part in the place of what the result has of it; that stays if it fails, as after a CUDA graph that did."""
    before = dict(trial.result)
    replace(trial.result, without(before, [name]))
    guarded(trial, name, partial(measure, trial))
    if is_measured(before, name) and not is_measured(trial.result, name):
        replace(trial.result, before)
        click.echo(f"{name}: the earlier result stays", err=True)


def replace(result: dict[str, Any], by: dict[str, Any]) -> None:
    """In place, since others hold it."""
    result.clear()
    result.update(by)


def parts(study: "subprocess.Popen[bytes] | None") -> dict[str, Callable[[Trial], object]]:
    """What measures each of PARTS."""
    measures: tuple[Callable[[Trial], object], ...] = (
        *(measure_forms, measure_runtime, measure_labels, measure_served, partial(measure_study, study=study)),
        *(measure_profile, measure_graphs, measure_onnx_runtime, measure_compiled),
    )
    return dict(zip(PARTS, measures, strict=True))


def random_checkpoint(path: Path) -> Path:
    """oar9's network with random weights, at native resolution: time does not depend on them."""
    config, _ = load_config("oar9")
    torch.manual_seed(0)
    save_checkpoint(path, AnatomyNet(config.classes).eval(), config)
    return path


def tell(result: dict[str, Any]) -> None:
    """The table of forms, and all the rest as it will be read by machines."""
    rows = [
        (name, f"{row['seconds'] * 1000:.1f}", f"{row.get('changed_share', 0):.2e}", f"{row.get('peak_gb', 0):.1f}")
        for name, row in result.get("forms", {}).items()
    ]
    for line in table_lines(("form", "ms", "labels changed", "peak GB"), rows):
        click.echo(line)
    for name in ("runtime", "labels", "served_on", "served", "study", "not_measured", "part_seconds", "earlier"):
        click.echo(f"{name}: {json.dumps(_rounded(result.get(name)))}")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
