"""The parts `runtime` and `ONNX Runtime` of benchmarks.gpu: the network as it is called, both copies included."""

import click

from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.gpu_runtime import GpuRuntime
from anatomynet.engine.onnx_files import CPU_PROVIDER
from anatomynet.engine.runtime import CUDA_PROVIDER, OnnxRuntime
from benchmarks.gpu_trial import Row, Trial, median_seconds


def measure_runtime(trial: Trial) -> None:
    """What Triton's Python backend computes with, without Triton: both copies included."""
    rows: dict[str, Row] = {}
    for tune in (False, True):
        runtime = GpuRuntime(*load_checkpoint(trial.checkpoint), device=trial.device, tune=tune)
        seconds = median_seconds(lambda: runtime.infer(trial.hu), trial)  # noqa: B023  called at once
        rows["tuned" if tune else "as it is"] = {"seconds": seconds, "on": runtime.description}
        trial.result["runtime"] = rows


def measure_onnx_runtime(trial: Trial) -> None:
    """The exported FP16 file, where ONNX Runtime has CUDA.

    Raises:
        click.ClickException: it has not.
    """
    import onnxruntime

    from anatomynet.export.onnx import network_model, served_model, write_onnx

    if trial.on_gpu and CUDA_PROVIDER not in onnxruntime.get_available_providers():
        raise click.ClickException("ONNX Runtime here has no CUDA: pip install onnxruntime-gpu")
    network, config = load_checkpoint(trial.checkpoint)
    file = trial.folder / "fp16.onnx"
    write_onnx(served_model(network_model(network), config, fp16=True), file)
    runtime = OnnxRuntime(file, providers=(CUDA_PROVIDER, CPU_PROVIDER) if trial.on_gpu else None)
    if trial.on_gpu and CUDA_PROVIDER not in runtime.providers:
        raise click.ClickException("ONNX Runtime's CUDA does not start here")
    seconds = median_seconds(lambda: runtime.infer(trial.hu), trial)
    rows = trial.result.setdefault("forms", {})
    rows["ONNX Runtime, FP16 file"] = {"seconds": seconds, "on": runtime.description}
