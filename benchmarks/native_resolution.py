"""Does a CT at native resolution fit in memory, and how long does it take? `oar9`'s network, in the embedded engine.

    python -m benchmarks.native_resolution [--checkpoint FILE] [--slices 44 --slices 89 --slices 178] [--runtime onnx]

Without a checkpoint the weights are random: time and memory do not depend on them, but for the box of what is drawn,
and random weights draw everywhere, which is the worst case. Each number of slices is a process of its own, which
computes them once. Prints a table, writes benchmarks/results/native_resolution.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.config import load_config
from anatomynet.engine.network import AnatomyNet
from anatomynet.export.onnx import network_model, served_model, write_onnx
from benchmarks.common import KIB_PER_GB, machine, write_result
from benchmarks.served import phantom_hu

KFLOP_A_VOXEL = 218  # of 10 classes
RUNTIMES = {"openvino": "OpenVinoRuntime", "onnx": "OnnxRuntime"}
# One volume in a process of its own: what it was before, what it took, and how long.
ONE_VOLUME = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
from anatomynet.engine import runtime

def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

computes = getattr(runtime, sys.argv[1])(Path(sys.argv[2]))
hu = np.load(sys.argv[3])
before, start = peak_gb(), time.perf_counter()
labels, _ = computes.infer(hu)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "before_gb": before, "drawn_share": float((labels > 0).mean())}))
"""


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Of stride 1; random weights without.")
@click.option("--slices", multiple=True, type=int, default=(44, 89, 178), show_default=True)
@click.option("--side", default=512, show_default=True, help="Voxels in plane.")
@click.option("--runtime", type=click.Choice(list(RUNTIMES)), default="openvino", show_default=True)
def main(checkpoint: Path | None, slices: tuple[int, ...], side: int, runtime: str) -> None:
    """Time and peak memory of whole volumes at stride 1."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "native.onnx"
        write_native_model(checkpoint, file)
        rows = [measure(file, (depth, side, side), RUNTIMES[runtime]) for depth in tqdm(sorted(slices))]
    for row in rows:
        click.echo(
            f"{' x '.join(map(str, row['shape']))}: {row['seconds']:.1f} s, {row['gflop_a_second']:.0f} GFLOP/s, peak "
            f"{row['peak_gb']:.2f} GB, {row['drawn_share']:.0%} drawn"
        )
    write_result("native_resolution", {"machine": machine(), "runtime": RUNTIMES[runtime], "rows": rows})


def write_native_model(checkpoint: Path | None, file: Path) -> None:
    """The served model at stride 1, as ONNX."""
    if checkpoint:
        network, config = load_checkpoint(checkpoint)
    else:
        config, _ = load_config("oar9")
        network = AnatomyNet(config.classes).eval()
    if config.in_plane_stride != 1:
        raise click.ClickException(f"{config.name} averages {config.in_plane_stride} voxels: expected stride 1")
    write_onnx(served_model(network_model(network), config, fp16=False), file)


def measure(file: Path, shape: tuple[int, int, int], runtime_class: str) -> dict[str, Any]:
    """One volume, once, in a process of its own."""
    import numpy as np

    volume = file.with_name("volume.npy")
    np.save(volume, phantom_hu(shape))
    command = [sys.executable, "-c", ONE_VOLUME, runtime_class, str(file), str(volume)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise click.ClickException(f"{shape} left with status {os.waitstatus_to_exitcode(status)}")
    row: dict[str, Any] = json.loads(output)
    flop = KFLOP_A_VOXEL * 1e3 * shape[0] * shape[1] * shape[2]
    return row | {
        "shape": shape,
        "process_seconds": time.perf_counter() - start,
        "gflop_a_second": flop / row["seconds"] / 1e9,
        "peak_gb": usage.ru_maxrss / KIB_PER_GB,
    }


if __name__ == "__main__":
    main()
