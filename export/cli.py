"""`anatomynet-export`: a checkpoint becomes what serves it, each form proven, in a Triton model repository.

    checkpoint -> ONNX, plans (export.forms) -> parity with the checkpoint (export.parity) -> export.repository

Nothing reaches the repository before everything is proven; a run that fails leaves it as it was.
"""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from anatomynet.engine.command import reports_errors
from anatomynet.engine.errors import ExportError
from anatomynet.engine.output import alone_in, write_whole
from anatomynet.engine.stops import temporary_folder

if TYPE_CHECKING:
    from anatomynet.export.forms import FinderCheckpoint, Source

NEEDED = ("torch", "safetensors", "onnx", "onnxscript", "onnxruntime")
BACKENDS = ("python", "onnxruntime", "tensorrt")


@click.command()
@click.version_option(package_name="anatomynet")
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option("--fp16", is_flag=True, help="FP16, for GPUs; beside FP32 where the backend can choose.")
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default=BACKENDS[0],
    show_default=True,
    help="Triton's, that will serve it: python runs anywhere; onnxruntime and tensorrt are those of a Triton "
    "container; tensorrt builds a plan for this machine's GPU.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("triton_repo"),
    show_default=True,
    help="Triton model repository; its model 'anatomynet' is replaced. Plans and timings go to OUTPUT.plans beside it.",
)
@click.option(
    "--region",
    type=click.Path(path_type=Path),
    help="Checkpoint of the region finder, the model 'anatomynet_region' beside it. Without it: the shipped one.",
)
@click.option("--onnx", "onnx_file", type=click.Path(path_type=Path), help="Write this one file, and no repository.")
@click.option(
    "--rtx",
    metavar="SM,...",
    help="Build a TensorRT-RTX plan for these GPUs (sm86,sm89,sm120), and no repository. Needs no GPU.",
)
@click.option(
    "--parity-input",
    type=click.Path(path_type=Path),
    help="CT for the proof: a case folder with img.nrrd. Without it a synthetic patient, 178 x 512 x 512.",
)
@reports_errors
def main(
    checkpoint: Path | None,
    fp16: bool,
    backend: str,
    output: Path,
    region: Path | None,
    onnx_file: Path | None,
    rtx: str | None,
    parity_input: Path | None,
) -> None:
    """Export CHECKPOINT, by default the shipped one, for serving.

    Each file is run once written, and must draw what the checkpoint draws; otherwise nothing is changed.
    """
    if backend == "tensorrt" and not (fp16 or onnx_file):
        raise click.UsageError("a TensorRT plan is FP16: give --fp16 too")
    if onnx_file and rtx is not None:
        raise click.UsageError("--onnx and --rtx each write one thing: give one of them")
    architectures = [] if rtx is None else list(dict.fromkeys(name.strip().lower() for name in rtx.split(",")))
    for place in _places(output, onnx_file, backend=backend, plan_alone=bool(architectures)):
        check_place(place, is_file=place == onnx_file)
    check_installed(None if onnx_file else backend, architectures)
    from anatomynet.engine.checkpoint import load_region_checkpoint
    from anatomynet.export import forms

    finder = load_region_checkpoint(region)
    source = forms.read_source(checkpoint, parity_input)
    with temporary_folder(prefix="anatomynet-export-") as folder:
        if onnx_file:
            write_whole(onnx_file, forms.onnx_file(source, Path(folder), fp16=fp16).read_bytes(), overwrite=True)
            click.echo(onnx_file)
        elif architectures:
            click.echo(
                move_in_place(forms.rtx_form(source, Path(folder), architectures=architectures), plans_of(output))
            )
        else:
            fill_repository(source, output, Path(folder), backend=backend, fp16=fp16, finder=finder)


def fill_repository(
    source: "Source", output: Path, folder: Path, *, backend: str, fp16: bool, finder: "FinderCheckpoint"
) -> None:
    """Exports to `folder`, proves it, and hands all of it to the repository `output` at once, the region finder too.

    Raises:
        ExportError: a graph that does not run, or a repository that cannot be written.
        ParityError: an export that does not draw what the checkpoint draws.
    """
    from anatomynet.export import forms
    from anatomynet.export.repository import write_repository

    beside = forms.region_form(finder, source.config, folder, backend=backend)
    if backend == "tensorrt":
        models = forms.tensorrt_form(source, folder, timing_cache_folder=plans_of(output))
    elif backend == "onnxruntime":
        models = forms.onnxruntime_form(source, folder, fp16=fp16)
    else:
        models = forms.python_form(source, folder, fp16=fp16)
    write_repository(output, [*models, *beside])
    for model in (*models, *beside):
        click.echo(f"{output / model.name}: {', '.join(model.files) or 'calls ' + ', '.join(model.needs)}")
    click.echo(f"serve it: tritonserver --model-repository {output}")


def check_installed(backend: str | None, architectures: list[str]) -> None:
    """Raises ExportError where what exports is not installed, or not here; None is one ONNX file, for any backend."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"export needs {', '.join(missing)}: pip install 'anatomynet[export]'")
    from anatomynet.export import forms

    if architectures:
        forms.require_rtx(architectures)
    elif backend == "tensorrt":
        forms.require_tensorrt()


def _places(output: Path, onnx_file: Path | None, *, backend: str, plan_alone: bool) -> list[Path]:
    """Where something will be written."""
    if onnx_file:
        return [onnx_file]
    if plan_alone:
        return [plans_of(output)]
    return [output, plans_of(output)] if backend == "tensorrt" else [output]


def check_place(place: Path, *, is_file: bool) -> None:
    """Raises ExportError where nothing can be written: a proof takes minutes, and all of them would be lost."""
    place = place.absolute()
    if is_file and place.is_dir():
        raise ExportError(f"{place} is a folder: expected the name of an ONNX file to write")
    if is_file and not place.parent.is_dir():
        raise ExportError(f"{place}: its folder does not exist; make it, or give another")
    # What is missing of a repository's path is made.
    folder = place.parent if is_file else next(path for path in (place, *place.parents) if os.path.lexists(path))
    if not folder.is_dir():
        raise ExportError(f"could not write {place}: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ExportError(f"could not write {place}: {folder} is read-only here; give another folder")


def plans_of(output: Path) -> Path:
    """Beside the repository, where a server takes every folder for a model."""
    return output.with_name(f"{output.name}.plans")


def move_in_place(folder: Path, home: Path) -> Path:
    """Copies a folder of files beside its place in `home`, then renames: never half a folder; an older one goes.

    Raises:
        ExportError: a place that cannot be written.
    """
    place = home / folder.name
    try:
        home.mkdir(parents=True, exist_ok=True)
        with temporary_folder(prefix=f".{folder.name}-", dir=home) as beside:
            copied = Path(beside) / folder.name
            copied.mkdir()
            for file in sorted(folder.iterdir()):  # copytree's error would not say what the disk said
                shutil.copyfile(file, copied / file.name)
            with alone_in(home):
                shutil.rmtree(place, ignore_errors=True)
                copied.replace(place)
    except OSError as error:
        raise ExportError(f"could not write {place}: {error.strerror}") from error
    return place
