"""What does a volume's way to a server and back cost? By shared memory, gRPC and HTTP, the network excluded.

    python -m benchmarks.transport [--repeats 5]

A real server on this machine with a model that answers at once (benchmarks.echo_model). Shared memory and gRPC are our
client's; HTTP is tritonclient's own, binary. Three volumes: a head-and-neck box and the body's box, each cut from a
whole study as `segment` cuts them, and the study itself; by shared memory all but the warm-up go through a region that
is kept. Beside them what the one copy into a region costs, into one that was just made and into one that was kept: a
tensor in shared memory has no gaps and the box is known only once the study is read, so decoding slices straight into
the region could save that copy at most, and only by sending the whole. Prints a table of medians, writes
benchmarks/results/transport.json.
"""

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from anatomynet.client.shared_memory import SHARED_MEMORY_FOLDER, SharedRegion
from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.command import reports_errors
from anatomynet.engine.config import shipped_weights
from anatomynet.engine.runtime import load_runtime
from anatomynet.engine.volume import HounsfieldArray
from anatomynet.export.repository import write_repository
from anatomynet.export.triton_models import MODEL_SOURCE, python_model
from benchmarks.common import machine, table_lines, write_result
from benchmarks.served import WHOLE
from tests.triton_servers import RunningServer, running_server, unwatched

SHARED, GRPC, HTTP = WAYS = ("shared memory", "gRPC", "HTTP")
# Of the phantom's study (z, y, x): what `segment` sends of it, with --whole-volume, and all.
VOLUMES = {"head-and-neck box": (144, 224, 192), "body box": (178, 288, 512), "whole study": WHOLE}
GOALS_S = {(SHARED, "body box"): 0.1, (GRPC, "head-and-neck box"): 0.5}
FACTOR_FOR_HTTP = 2.0
COPIES = {
    "written": "copy into a new region",
    "mapped": "through a mapping of it",
    "kept": "copy into a kept region",
}
ECHO_MODEL = Path(__file__).with_name("echo_model.py")

Seconds = dict[str, dict[str, float]]


@click.command()
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Timed runs each, after one to warm up."
)
@click.option(
    "--scale",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of every side: smaller is sooner.",
)
@reports_errors
def main(repeats: int, scale: float) -> None:
    """Time every way for every volume."""
    whole = np.random.default_rng(0).integers(-1000, 2000, scaled(WHOLE, scale), dtype=np.int16)
    volumes = {name: box_of(whole, scaled(shape, scale)) for name, shape in VOLUMES.items()}
    seconds: Seconds = {name: {} for name in volumes}
    copies: Seconds = {}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        repository = write_echo_repository(folder / "repository")
        # Our `tritonserver` starts no code but its own.
        server = stack.enter_context(running_server(repository, folder=folder, program=unwatched(folder)))
        askers = {way: stack.enter_context(asker(server, way)) for way in WAYS}
        for name, hu in tqdm(volumes.items(), desc="volumes"):
            for way, ask in askers.items():
                seconds[name][way] = median_seconds(partial(ask, hu), repeats)
            copies[name] = time_copies(hu, repeats)
    result = {"machine": machine(), "repeats": repeats, "seconds": seconds, "copies": copies}
    result["shapes"] = {name: hu.shape for name, hu in volumes.items()}
    tell(result)
    write_result("transport", result)


def tell(result: dict[str, Any]) -> None:
    """The tables, the goals, and whether HTTP would be worth it."""
    seconds, copies = result["seconds"], result["copies"]
    header = ("volume", "voxels", *(f"{way} s" for way in WAYS), *(f"{copy} s" for copy in COPIES.values()))
    rows = [
        (
            name,
            " x ".join(map(str, result["shapes"][name])),
            *(f"{seconds[name][way]:.3f}" for way in WAYS),
            *(f"{copies[name][copy]:.3f}" for copy in COPIES),
        )
        for name in seconds
    ]
    for line in table_lines(header, rows):
        click.echo(line)
    for (way, name), goal in GOALS_S.items():
        found = seconds[name][way]
        click.echo(f"{way}, {name}: {found:.3f} s, goal {goal:g} s{'' if found <= goal else ': missed'}")
    ratio = seconds["head-and-neck box"][GRPC] / seconds["head-and-neck box"][HTTP]
    verdict = "gRPC stays" if ratio < FACTOR_FOR_HTTP else "HTTP would pay"
    click.echo(f"gRPC takes {ratio:.2f} times as long as HTTP for the head-and-neck box: {verdict}")


def scaled(shape: tuple[int, int, int], scale: float) -> tuple[int, int, int]:
    """Every side times `scale`."""
    z, y, x = (max(8, round(side * scale)) for side in shape)
    return (z, y, x)


def box_of(whole: HounsfieldArray, shape: tuple[int, int, int]) -> HounsfieldArray:
    """A view of that shape in the middle of a volume."""
    starts = [(side - part) // 2 for side, part in zip(whole.shape, shape, strict=True)]
    return whole[tuple(slice(start, start + part) for start, part in zip(starts, shape, strict=True))]


def write_echo_repository(folder: Path) -> Path:
    """A repository in which `anatomynet` answers at once."""
    onnx_file = shipped_weights(".onnx")
    model = python_model(load_runtime(onnx_file).model, [onnx_file])
    write_repository(folder, [replace(model, files={MODEL_SOURCE: ECHO_MODEL})])
    return folder


@contextmanager
def asker(server: RunningServer, way: str) -> Iterator[Callable[[HounsfieldArray], object]]:
    """What sends a volume and waits for its label map."""
    if way != HTTP:
        with TritonRuntime(server.url, shared_memory="on" if way == SHARED else "off") as runtime:
            yield runtime.infer
        return
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    client = InferenceServerClient(server.http_url.removeprefix("http://"))

    def ask(hu: HounsfieldArray) -> object:
        ct = InferInput("CT", hu.shape, "INT16")
        ct.set_data_from_numpy(hu)
        outputs = [InferRequestedOutput(name, binary_data=True) for name in ("LABEL_MAP", "CONFIDENCE")]
        return client.infer("anatomynet", [ct], outputs=outputs).as_numpy("LABEL_MAP")

    try:
        yield ask
    finally:
        client.close()


def time_copies(hu: HounsfieldArray, repeats: int) -> dict[str, float]:
    """Median seconds to copy a volume into a region that was just made, as the client does and through a mapping, and
    into one whose pages are there."""
    with new_region(hu) as region:
        region.write(hu)
        os.posix_fallocate(region.descriptor, region.hu_bytes, region.label_bytes)
        kept = region.mapped()
        ways = {"written": partial(write, hu), "mapped": partial(write_mapped, hu), "kept": partial(kept.write, hu)}
        return {name: median_seconds(work, repeats) for name, work in ways.items()}


@contextmanager
def new_region(hu: HounsfieldArray) -> Iterator[SharedRegion]:
    """Without a page, and without a server."""
    with tempfile.TemporaryFile(dir=SHARED_MEMORY_FOLDER) as file:
        file.truncate(3 * hu.size)
        yield SharedRegion("", file.fileno(), hu.shape, expiry=0.0)


def write(hu: HounsfieldArray) -> None:
    """Slice by slice, as a file."""
    with new_region(hu) as region:
        region.write(hu)


def write_mapped(hu: HounsfieldArray) -> None:
    """Through a mapping, for which the memory must be had first: else a full /dev/shm ends the process."""
    with tempfile.TemporaryFile(dir=SHARED_MEMORY_FOLDER) as file:
        os.posix_fallocate(file.fileno(), 0, hu.nbytes)
        with mmap.mmap(file.fileno(), hu.nbytes) as memory:
            target = np.frombuffer(memory, np.int16).reshape(hu.shape)
            np.copyto(target, hu)
            del target  # a mapping that is looked at cannot be closed


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """After one run to warm up."""
    return statistics.median([seconds_of(work) for _ in range(repeats + 1)][1:])


def seconds_of(work: Callable[[], object]) -> float:
    """Of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
