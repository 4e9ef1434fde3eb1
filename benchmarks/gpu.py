"""How fast is the whole CT on an NVIDIA GPU, and what makes it so? One table of forms, and a served one with clients.

    python -m benchmarks.gpu [--checkpoint FILE] [--slices 178] [--side 512] [--clients 1 --clients 2]

The forms are the same network in PyTorch: FP32, FP16, channels last, channels padded to multiples of 8, torch.compile,
a CUDA graph; then the exported FP16 file in ONNX Runtime; then the real tritonserver with its Python backend, which
takes what is fastest of the exported files, and 1, 2 and 4 clients at once over shared memory. Everything from INT16
Hounsfield units to labels is timed. Prints a table, writes benchmarks/results/gpu.json.

`--device cpu` runs the same lines on a small volume without a GPU, for who changes this script: its times mean nothing.
"""

import copy
import dataclasses
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from benchmarks.padded import padded_network
from torch import Tensor, nn

from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.config import ModelConfig, load_config
from anatomynet.engine.network import AnatomyNet, ServedNetwork
from anatomynet.engine.runtime import CPU_PROVIDER, CUDA_PROVIDER, OnnxRuntime, Runtime
from anatomynet.engine.volume import HounsfieldArray
from anatomynet.export.onnx import export_onnx, folded
from anatomynet.export.repository import write_repository
from anatomynet.export.triton_models import python_model
from benchmarks.common import machine, write_result
from benchmarks.served import percentiles, phantom_hu
from tests.triton_servers import running_server

CHANNELS_MULTIPLE = 8  # what tensor cores want of FP16
WARM_UPS = 3
LAST = torch.channels_last_3d

Form = Callable[[Tensor], Tensor]


class InPrecision(nn.Module):
    """A network in its own precision and layout, with FP32 around it."""

    def __init__(self, network: nn.Module, precision: torch.dtype, layout: torch.memory_format) -> None:
        super().__init__()
        self.network = network.to(dtype=precision, memory_format=layout)  # type: ignore[call-overload]
        self.precision, self.layout = precision, layout

    def forward(self, x: Tensor) -> Tensor:
        """Float (1, 1, z, y, x) -> logits, float."""
        logits: Tensor = self.network(x.to(dtype=self.precision, memory_format=self.layout))
        return logits.float()


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Random weights of oar9's network without.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--slices", default=178, show_default=True)
@click.option("--side", default=512, show_default=True)
@click.option("--repeats", default=10, show_default=True, help="Timed runs each.")
@click.option("--clients", multiple=True, type=int, default=(1, 2, 4), show_default=True)
def main(checkpoint: Path | None, device: str, slices: int, side: int, repeats: int, clients: tuple[int, ...]) -> None:
    """Compare forms of the network on a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("no NVIDIA GPU here, or a PyTorch without CUDA; --device cpu tries the script alone")
    network, config = given_network(checkpoint)
    hu = phantom_hu((slices, side, side))
    rows = measure_forms(forms_of(network, config, device), torch.from_numpy(hu).to(device), device, repeats)
    with tempfile.TemporaryDirectory() as folder:
        files = exported_files(network, config, Path(folder))
        rows["ONNX Runtime, FP16 file"] = measure_onnx_runtime(files[-1], hu, device, repeats)
        served = measure_served(config, files, Path(folder), hu, clients, repeats)
    for name, row in {**rows, **served}.items():
        click.echo(f"{name:<28}" + "  ".join(f"{key} {value}" for key, value in _rounded(row).items()))
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none: a trial on a CPU"
    result = {"machine": machine() | {"gpu": gpu}, "shape": hu.shape, "stride": config.in_plane_stride}
    write_result("gpu" if device == "cuda" else "gpu_trial", {**result, "rows": rows, "served": served})


def given_network(checkpoint: Path | None) -> tuple[AnatomyNet, ModelConfig]:
    """A checkpoint's, or one of random weights at native resolution: time does not depend on them."""
    if checkpoint:
        return load_checkpoint(checkpoint)
    config, _ = load_config("oar9")
    torch.manual_seed(0)
    return AnatomyNet(config.classes).eval(), dataclasses.replace(config, checkpoint_sha256="0" * 64)


def forms_of(network: AnatomyNet, config: ModelConfig, device: str) -> Iterator[tuple[str, Callable[[], Form]]]:
    """Names and what builds each; one is built once the one before has gone from memory."""
    half, usual = (torch.float16 if device == "cuda" else torch.float32), torch.contiguous_format
    lean = folded(network)

    def served(form: nn.Module) -> ServedNetwork:
        return ServedNetwork(form, config).to(device).eval()

    def labels_of(module: Callable[[Tensor], Any]) -> Form:
        return lambda hu: module(hu)[0]

    def built(source: Callable[[], nn.Module], precision: torch.dtype, layout: torch.memory_format) -> ServedNetwork:
        return served(InPrecision(source(), precision, layout))

    plain, padded = (lambda: folded_copy(lean)), (lambda: padded_network(network, CHANNELS_MULTIPLE))
    yield "FP32", lambda: labels_of(built(plain, torch.float32, usual))
    yield "FP16", lambda: labels_of(built(plain, half, usual))
    yield "FP16, channels last", lambda: labels_of(built(plain, half, LAST))
    yield "FP16, padded channels", lambda: labels_of(built(padded, half, usual))
    yield "FP16, padded, last", lambda: labels_of(built(padded, half, LAST))
    yield "FP16, torch.compile", lambda: labels_of(torch.compile(built(plain, half, usual), dynamic=False))
    yield "FP16, last, torch.compile", lambda: labels_of(torch.compile(built(plain, half, LAST), dynamic=False))
    if device == "cuda":
        yield "FP16, last, CUDA graph", lambda: cuda_graph(built(plain, half, LAST))
        yield "FP16, padded, last, graph", lambda: cuda_graph(built(padded, half, LAST))


def folded_copy(lean: AnatomyNet) -> AnatomyNet:
    """A form changes its network's precision: each gets its own."""
    return copy.deepcopy(lean)


def cuda_graph(module: nn.Module) -> Form:
    """Recorded at the first volume, replayed for every one of the same size."""
    recorded: list[tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = []

    def replay(hu: Tensor) -> Tensor:
        if not recorded:
            given = hu.clone()
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a graph may not be the first to ask for memory and algorithms
                for _ in range(WARM_UPS):
                    module(given)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                labels = module(given)[0]
            recorded.append((graph, given, labels))
        graph, given, labels = recorded[0]
        given.copy_(hu)
        graph.replay()
        return labels

    return replay


def measure_forms(
    forms: Iterator[tuple[str, Callable[[], Form]]], hu: Tensor, device: str, repeats: int
) -> dict[str, dict[str, Any]]:
    """Median seconds, peak memory of the GPU, and the share of labels that FP32 draws otherwise."""
    rows: dict[str, dict[str, Any]] = {}
    expected: Tensor | None = None
    for name, build in forms:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            form = build()
            labels = form(hu).clone()
            expected = labels if expected is None else expected
            rows[name] = {
                "seconds": median_seconds(lambda form=form: form(hu), device, repeats),  # type: ignore[misc]
                "changed_share": float((labels != expected).float().mean()),
            }
        click.echo(f"{name}: {rows[name]['seconds']:.4f} s", err=True)
        if device == "cuda":
            rows[name]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        del form
    return rows


def median_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Of `repeats` runs after some to warm up; on a GPU each is waited for."""
    seconds = []
    for number in range(WARM_UPS + repeats):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= WARM_UPS:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def exported_files(network: AnatomyNet, config: ModelConfig, folder: Path) -> list[Path]:
    """FP32 and FP16, as `anatomynet-export --fp16` writes them."""
    files = [folder / f"{config.name}-{precision}.onnx" for precision in ("fp32", "fp16")]
    for file in files:
        export_onnx(network, config, file, fp16="fp16" in file.stem)
    return files


def measure_onnx_runtime(file: Path, hu: HounsfieldArray, device: str, repeats: int) -> dict[str, Any]:
    """What Triton's Python backend computes with, without Triton."""
    runtime = OnnxRuntime(file, providers=(CUDA_PROVIDER, CPU_PROVIDER) if device == "cuda" else None)
    if device == "cuda" and CUDA_PROVIDER not in runtime.providers:
        raise click.ClickException("ONNX Runtime here has no CUDA: pip install onnxruntime-gpu")
    return {"seconds": median_seconds(lambda: runtime.infer(hu), "cpu", repeats), "on": runtime.description}


def measure_served(
    config: ModelConfig, files: list[Path], folder: Path, hu: HounsfieldArray, clients: tuple[int, ...], repeats: int
) -> dict[str, dict[str, Any]]:
    """The real server over shared memory: seconds of a volume, volumes a second, memory of the GPU."""
    write_repository(folder / "repository", [python_model(config, files)])
    rows = {}
    with running_server(folder / "repository", folder=folder) as server, connections(server.url, max(clients)) as all_:
        all_[0].infer(hu)  # the size is new to it
        for count in clients:
            start = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                seconds = [s for each in pool.map(lambda r: _timed(r, hu, repeats), all_[:count]) for s in each]
            volumes_a_second = len(seconds) / (time.perf_counter() - start)
            rows[f"Triton, {count} clients"] = {
                **percentiles(seconds),
                "volumes_a_second": volumes_a_second,
                "gpu_mib": gpu_memory_mib(),
            }
    return rows


@contextmanager
def connections(url: str, count: int) -> Iterator[list[TritonRuntime]]:
    """So many clients of one server."""
    runtimes = [TritonRuntime(url, timeout_s=600.0) for _ in range(count)]
    try:
        yield runtimes
    finally:
        for runtime in runtimes:
            runtime.close()


def gpu_memory_mib() -> str:
    """Of all processes on each GPU, as the driver says; empty without one."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().replace("\n", " ")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _timed(runtime: Runtime, hu: HounsfieldArray, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        runtime.infer(hu)
        seconds.append(time.perf_counter() - start)
    return seconds


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float | np.floating) else value for key, value in row.items()}


if __name__ == "__main__":
    main()
