"""`anatomynet-export`: a checkpoint becomes ONNX and TensorRT files, each proven, in a Triton model repository.

    checkpoint -> ONNX (export.onnx) -> parity with the checkpoint (export.parity) -> repository (export.repository)

Nothing reaches the repository before everything is proven; a run that fails leaves it as it was.
"""

import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from anatomynet.engine.command import reports_errors
from anatomynet.engine.errors import ExportError

if TYPE_CHECKING:
    import onnx

    from anatomynet.engine.config import ModelConfig
    from anatomynet.engine.volume import HounsfieldArray
    from anatomynet.export.parity import Reference

PHANTOM_SEED = 0
NEEDED = ("torch", "safetensors", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, eq=False)
class Source:
    """What is exported: the network as ONNX, its configuration, and what the checkpoint itself draws."""

    graph: "onnx.ModelProto"
    config: "ModelConfig"
    reference: "Reference"


@click.command()
@click.version_option(package_name="anatomynet")
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option("--fp16", is_flag=True, help="FP16 as well, for GPUs: ONNX, and a TensorRT plan where one can be built.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("triton_repo"),
    show_default=True,
    help="Triton model repository; its model 'anatomynet' is replaced.",
)
@click.option("--onnx", "onnx_file", type=click.Path(path_type=Path), help="Write this one file, and no repository.")
@click.option(
    "--parity-input",
    type=click.Path(path_type=Path),
    help="CT for the proof: a case folder with img.nrrd. Without it a synthetic patient, 178 x 512 x 512.",
)
@reports_errors
def main(checkpoint: Path | None, fp16: bool, output: Path, onnx_file: Path | None, parity_input: Path | None) -> None:
    """Export CHECKPOINT, by default the shipped one, for serving.

    Each file is run once written, and must draw what the checkpoint draws; otherwise nothing is changed.
    """
    check_installed()
    source = read_source(checkpoint, parity_input)
    with tempfile.TemporaryDirectory(prefix="anatomynet-export-") as folder:
        if onnx_file:
            copy_in_place(write_proven_onnx(source, Path(folder), fp16=fp16), onnx_file)
            click.echo(onnx_file)
        else:
            fill_repository(source, output, Path(folder), fp16=fp16)


def read_source(checkpoint: Path | None, parity_input: Path | None) -> Source:
    """Reads the checkpoint, runs it on the CT of the proof, and exports its network.

    Raises:
        ModelError: a checkpoint that cannot be read.
        DataError: a `parity_input` that cannot be read.
        ParityError: a structure that the checkpoint does not find there.
    """
    from anatomynet.engine.checkpoint import load_checkpoint
    from anatomynet.export.onnx import network_model
    from anatomynet.export.parity import draw_reference

    network, config = load_checkpoint(checkpoint)
    click.echo(f"checkpoint {config.name}, sha256 {config.checkpoint_sha256}: {', '.join(config.structures)}")
    hu = parity_volume(config, parity_input)
    click.echo(f"proof on {parity_input or 'a synthetic patient'}, {' x '.join(map(str, hu.shape))} voxels")
    reference = draw_reference(network, config, hu)
    return Source(network_model(network), config, reference)


def parity_volume(config: "ModelConfig", case: Path | None) -> "HounsfieldArray":
    """int16 (z, y, x): what the network is shown of a case, or the whole of a synthetic patient.

    Raises:
        DataError: a case that cannot be read.
        GeometryError: a CT on which the network cannot run.
    """
    if case is None:
        from anatomynet.engine.phantom import make_phantom

        volume, _ = make_phantom(seed=PHANTOM_SEED, structures=config.structures)
        return volume.hu
    from anatomynet.engine.data import read_case
    from anatomynet.engine.preprocess import prepare

    return prepare(read_case(case, config.structures).volume, config).hu


def fill_repository(source: Source, output: Path, folder: Path, *, fp16: bool) -> None:
    """Exports to `folder`, proves it, and hands all of it to the repository `output` at once.

    Raises:
        ExportError: a graph that does not run, or a repository that cannot be written.
        ParityError: an export that does not draw what the checkpoint draws.
    """
    from anatomynet.export.repository import MODEL_NAME, write_repository

    onnx_files = [write_proven_onnx(source, folder, fp16=False)]
    plan_files = []
    if fp16:
        onnx_files.append(write_proven_onnx(source, folder, fp16=True))
        plan_files = write_plan(source, folder)
    write_repository(output, config=source.config, onnx_files=onnx_files, plan_files=plan_files)
    names = ", ".join(file.name for file in (*onnx_files, *plan_files))
    click.echo(f"{output / MODEL_NAME}: {names}")
    click.echo(f"serve it: tritonserver --model-repository {output}")


def write_proven_onnx(source: Source, folder: Path, *, fp16: bool) -> Path:
    """Writes one ONNX file and proves it with the fastest runtime that is here.

    Raises:
        ExportError: a graph that does not run.
        ParityError: it does not draw what the checkpoint draws.
    """
    from anatomynet.engine.runtime import load_runtime
    from anatomynet.export.onnx import served_model, write_onnx
    from anatomynet.export.parity import check_parity

    precision = "fp16" if fp16 else "fp32"
    path = folder / f"{source.config.name}-{precision}.onnx"
    write_onnx(served_model(source.graph, source.config, fp16=fp16), path)
    click.echo(f"{path.name}, {path.stat().st_size / 1e6:.1f} MB")
    for report in check_parity(source.reference, load_runtime(path), fp16=fp16):
        click.echo(f"  {report}")
    return path


def write_plan(source: Source, folder: Path) -> list[Path]:
    """The TensorRT plan for this machine's GPU; none, and one line that says why, where it cannot be built.

    Raises:
        ExportError: TensorRT is here, and refuses the graph.
    """
    from anatomynet.export.onnx import plan_model
    from anatomynet.export.plan import build_plan, has_gpu

    if not has_gpu() or importlib.util.find_spec("tensorrt") is None:
        click.echo(
            "no TensorRT plan: it takes an NVIDIA GPU and pip install 'anatomynet[tensorrt]'; "
            "the FP16 ONNX file runs on a GPU without"
        )
        return []
    trt = importlib.import_module("tensorrt")
    path = folder / f"{source.config.name}-fp16.plan"
    path.write_bytes(
        build_plan(trt, plan_model(source.graph, source.config, fp16=True).SerializeToString(), source.config)
    )
    click.echo(
        f"{path.name}, {path.stat().st_size / 1e6:.1f} MB, by TensorRT {trt.__version__}; "
        "its precision is proven, its contours are not: the Python backend runs the ONNX files, not the plan"
    )
    return [path]


def check_installed() -> None:
    """Raises ExportError where what exports is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"export needs {', '.join(missing)}: pip install 'anatomynet[export]'")


def copy_in_place(file: Path, place: Path) -> None:
    """Copies beside `place`, then renames: never half a file.

    Raises:
        ExportError: a place that cannot be written.
    """
    beside = place.with_name(f".{place.name}.part")
    try:
        shutil.copyfile(file, beside)
        beside.replace(place)
    except OSError as error:
        raise ExportError(f"could not write {place}: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)
