"""Which engine computes the network fastest on this machine? Side by side, on the network's input of one study.

    python -m benchmarks.engines [--study FOLDER] [--repeats 3]

The network alone, without what averages the CT before it and interpolates its logits after it, on what `segment` shows
it of the study: in FP32 on every CPU core. GFLOP/s stand beside the peak that this machine reaches in a large matrix
product. On an NVIDIA GPU PyTorch in FP16 and ONNX Runtime too, where one is at hand. Without --study, the phantom.
Writes benchmarks/results/engines.json.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from anatomynet.client.study import read_ct_series, volume_from_series
from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.command import reports_errors
from anatomynet.engine.machine import available_cores
from anatomynet.engine.network import AnatomyNet, ServedNetwork
from anatomynet.engine.onnx_files import CPU_PROVIDER, openvino_core
from anatomynet.engine.preprocess import prepare
from anatomynet.engine.runtime import CUDA_PROVIDER, PROVIDER_OPTIONS
from anatomynet.export.onnx import network_model
from benchmarks.common import machine, study_or_phantom, table_lines, write_result

MATRIX = 3072
OPENVINO = "OpenVINO"
NO_GPU = "no NVIDIA GPU here"

Logits = NDArray[np.float32]
Engine = Callable[[], Logits]


@click.command()
@click.option("--study", type=click.Path(path_type=Path, exists=True), help="A CT study; the phantom if not given.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Timed runs each, after one to warm up."
)
@reports_errors
def main(study: Path | None, repeats: int) -> None:
    """Time the network in every engine."""
    network, model = load_checkpoint()
    with study_or_phantom(study) as study:
        hu = prepare(volume_from_series(read_ct_series(study)), model).hu
    x = ServedNetwork(network, model).network_input_from_hu(torch.from_numpy(np.ascontiguousarray(hu)))
    flop, peak = flop_of(network, x), 0.0
    rows: dict[str, dict[str, float]] = {}
    not_measured: dict[str, str] = {}
    reference: Logits | None = None
    for name, start in tqdm(ENGINES.items(), desc="engines"):
        peak = max(peak, matmul_flops())  # again and again: what disturbs it once does not last
        try:
            seconds, logits = timed(start(network, x), repeats)
        except LookupError as error:
            not_measured[name] = str(error)
            continue
        reference = logits if reference is None else reference
        rows[name] = {"seconds": seconds, "largest_difference": float(np.abs(logits - reference).max())}
    for row in rows.values():
        row["gflops"] = flop / row["seconds"] / 1e9
        row["times_openvino"] = row["seconds"] / rows[OPENVINO]["seconds"]
    result = {"machine": machine(), "repeats": repeats, "input": list(x.shape), "gflop": flop / 1e9}
    result |= {"matmul_peak_gflops": peak / 1e9, "rows": rows, "not_measured": not_measured}
    tell(result)
    write_result("engines", result)


def tell(result: dict[str, Any]) -> None:
    """The table."""
    voxels = int(np.prod(result["input"]))
    click.echo(
        f"input {result['input']}: {result['gflop']:.0f} GFLOP, {1e6 * result['gflop'] / voxels:.0f} kFLOP a voxel; "
        f"a matrix product of {MATRIX} x {MATRIX} reaches {result['matmul_peak_gflops']:.0f} GFLOP/s"
    )
    cells = [
        (
            name,
            f"{row['seconds']:.2f}",
            f"{row['gflops']:.0f}",
            "" if name in GPU_ENGINES else f"{row['gflops'] / result['matmul_peak_gflops']:.0%}",
            f"{row['times_openvino']:.2f}",
            f"{row['largest_difference']:.1g}",
        )
        for name, row in result["rows"].items()
    ]
    cells += [(name, "not measured", "", "", "", "") for name in result["not_measured"]]
    header = ("engine", "median s", "GFLOP/s", "of the peak", "times OpenVINO", "logits differ by")
    for line in table_lines(header, cells):
        click.echo(line)
    for name, reason in result["not_measured"].items():
        click.echo(f"not measured: {name}: {reason}")


def openvino_engine(network: AnatomyNet, x: torch.Tensor) -> Engine:
    """As the embedded engine compiles it."""
    import openvino
    from openvino import properties

    options = {
        properties.hint.performance_mode(): properties.hint.PerformanceMode.LATENCY,
        properties.hint.inference_precision(): openvino.Type.f32,
        properties.inference_num_threads(): available_cores(),
    }
    core = openvino_core()
    graph = core.read_model(network_model(network).SerializeToString())
    request = core.compile_model(graph, "CPU", options).create_infer_request()
    array = x.numpy()
    return lambda: np.asarray(request.infer([array], share_inputs=True)[0])


def onnxruntime_engine(network: AnatomyNet, x: torch.Tensor, provider: str = CPU_PROVIDER) -> Engine:
    """In FP32, also on a GPU."""
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise LookupError(NO_GPU)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    providers = [(provider, PROVIDER_OPTIONS.get(provider, {}))]
    session = onnxruntime.InferenceSession(network_model(network).SerializeToString(), options, providers=providers)
    (only,) = session.get_inputs()
    array = x.numpy()
    return lambda: np.asarray(session.run(None, {only.name: array})[0])


def torch_engine(
    network: AnatomyNet,
    x: torch.Tensor,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Engine:
    """Eager."""
    if device == "cuda" and not torch.cuda.is_available():
        raise LookupError(NO_GPU)
    moved: Any = copy.deepcopy(network).eval()  # `memory_format` is not typed
    moved.to(device=device, dtype=dtype, memory_format=memory_format)
    given = x.to(device=device, dtype=dtype, memory_format=memory_format)

    def run() -> Logits:
        with torch.inference_mode():
            logits: Logits = moved(given).float().cpu().numpy()
        return logits

    return run


ENGINES: dict[str, Callable[[AnatomyNet, torch.Tensor], Engine]] = {
    OPENVINO: openvino_engine,
    "ONNX Runtime": onnxruntime_engine,
    "PyTorch eager": torch_engine,
    "PyTorch channels_last_3d": lambda n, x: torch_engine(n, x, memory_format=torch.channels_last_3d),
    "PyTorch on a GPU, FP16": lambda n, x: torch_engine(n, x, device="cuda", dtype=torch.float16),
    "ONNX Runtime on a GPU": lambda n, x: onnxruntime_engine(n, x, CUDA_PROVIDER),
}
GPU_ENGINES = tuple(name for name in ENGINES if "GPU" in name)


def timed(engine: Engine, repeats: int) -> tuple[float, Logits]:
    """Median seconds after one run to warm up, and what it computed."""
    logits = engine()
    taken = list(each_run(engine, repeats))
    return statistics.median(taken), logits


def each_run(engine: Engine, repeats: int) -> Iterator[float]:
    """Seconds of one run after another."""
    for _ in range(repeats):
        start = time.perf_counter()
        engine()
        yield time.perf_counter() - start


def flop_of(network: AnatomyNet, x: torch.Tensor) -> float:
    """Of one pass, two for each multiplication with its addition; nothing is computed."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        copy.deepcopy(network).to("meta")(x.to("meta"))
    return float(counter.get_total_flops())


def matmul_flops() -> float:
    """FLOP a second in a product of two square matrices in FP32: the best of three."""
    a = torch.rand(MATRIX, MATRIX)
    seconds = min(each_run(lambda: torch.mm(a, a).numpy(), 3))
    return 2 * float(MATRIX) ** 3 / seconds


if __name__ == "__main__":
    main()
