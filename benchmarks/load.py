"""How does one server bear load? Clients at once, memory over hundreds of volumes, a full queue, a cancelled request.

    python -m benchmarks.load [--clients 1,2,4,8] [--each 2] [--small 500] [--whole 50] [--perf-analyzer FILE]

About 12 minutes on two cores; what was run is in the result. A real server on this machine. Its clients are
`anatomynet-client segment` on the phantom, each run its own process. --perf-analyzer is NVIDIA's, as in the
tritonclient 2.51.0 wheel (`pip download tritonclient==2.51.0 --no-deps`, in its *.data/data/bin); without it that part
is left out. Prints a table, writes benchmarks/results/load.json and load.png.
"""

import csv
import importlib.util
import os
import re
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.contract import CT, MODEL_NAME
from anatomynet.engine.volume import HounsfieldArray
from benchmarks.common import BIN, RESULTS, machine, study_or_phantom, write_result
from benchmarks.served import (
    SMALL,
    WHOLE,
    metric,
    percentiles,
    phantom_hu,
    resident_gb,
    together,
    write_shipped_repository,
)
from tests.triton_servers import RunningServer, running_server

# Of queue and computing together: more than a server takes in.
FLOOD = 20
PENDING = "nv_inference_pending_request_count"
POLL_S = 0.02
PATIENCE_S = 120.0
ANALYZED = 20
ANALYZER_S = 300


@click.command()
@click.option("--clients", default="1,2,4,8", show_default=True, help="How many at once, one row each.")
@click.option("--each", default=2, show_default=True, help="Studies that each client segments.")
@click.option("--small", default=500, show_default=True, help="Volumes of 64 x 256 x 256 for the curve of memory.")
@click.option("--whole", default=50, show_default=True, help="Volumes of 178 x 512 x 512 after them.")
@click.option("--perf-analyzer", type=click.Path(path_type=Path, exists=True), help="NVIDIA's, for the server alone.")
def main(clients: str, each: int, small: int, whole: int, perf_analyzer: Path | None) -> None:
    """Load one server in every way, and write what it did."""
    counts = {"studies_of_each_client": each, "small_volumes": small, "whole_volumes": whole}
    result: dict[str, Any] = {"machine": machine(), "small": SMALL, "whole": WHOLE, "run": counts}
    at_once = [int(count) for count in clients.split(",")]
    with tempfile.TemporaryDirectory() as temporary, study_or_phantom(None) as study:
        folder = Path(temporary)
        with running_server(write_shipped_repository(folder / "repository"), folder=folder) as server:
            result["memory"] = memory_over(server, {SMALL: small, WHOLE: whole})
            result["clients"] = [clients_at_once(server, study, count, each) for count in at_once]
            result["full_queue"] = fill_queue(server)
            result["cancelled"] = cancel_waiting(server)
            if perf_analyzer:
                libraries = analyzer_libraries(folder)
                result["perf_analyzer"] = [analyze(server, perf_analyzer, libraries, count) for count in at_once]
    draw(result["memory"])
    write_result("load", result)


def clients_at_once(server: RunningServer, study: Path, clients: int, each: int) -> dict[str, Any]:
    """Latency and throughput of so many users who do not wait for one another."""
    seconds: list[float] = []
    errors: list[str] = []

    def work(folder: Path) -> None:
        for k in range(each):
            start = time.perf_counter()
            run = subprocess.run(
                [BIN / "anatomynet-client", "segment", study, "--url", server.url, "--output", folder / f"{k}.dcm"],
                capture_output=True,
                text=True,
                check=False,
            )
            seconds.append(time.perf_counter() - start) if run.returncode == 0 else errors.append(run.stderr)

    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(k) for k in range(clients)]
        for folder in folders:
            folder.mkdir()
        wall = together([threading.Thread(target=work, args=(folder,)) for folder in folders])
    row: dict[str, Any] = {
        "clients": clients,
        "studies": len(seconds),
        "errors": errors,
        "per_minute": 60 * len(seconds) / wall,
        "seconds": percentiles(seconds),
        "server_gb": resident_gb(server.process.pid),
    }
    spread = ", ".join(f"{name} {value:.1f}" for name, value in row["seconds"].items())
    click.echo(f"{clients} clients: {row['per_minute']:5.1f} studies a minute, seconds {spread}, {len(errors)} errors")
    return row


def memory_over(server: RunningServer, volumes: dict[tuple[int, int, int], int]) -> list[dict[str, Any]]:
    """Resident memory of the server after every volume, one size after another."""
    curves = []
    with TritonRuntime(server.url, shared_memory="off") as runtime:
        for shape, count in volumes.items():
            hu = phantom_hu(shape)
            gb = []
            for _ in tqdm(range(count), desc=" x ".join(map(str, shape))):
                runtime.infer(hu)
                gb.append(round(resident_gb(server.process.pid), 4))
            half = gb[len(gb) // 2 :]
            grows_mb = 1000 * (half[-1] - half[0]) if half else 0.0
            curves.append({"shape": shape, "gb": gb, "second_half_grows_mb": grows_mb})
            if gb:
                click.echo(
                    f"{shape}: {gb[0]:.2f} GB after one, {gb[-1]:.2f} after {count}; {grows_mb:+.0f} MB in the 2nd half"
                )
    return curves


def fill_queue(server: RunningServer) -> dict[str, Any]:
    """More requests at once than the server takes in: who is refused hears it soon, and clearly."""
    hu = phantom_hu(SMALL)
    answered: list[float] = []
    refused: list[float] = []
    messages: set[str] = set()

    def ask() -> None:
        start = time.perf_counter()
        with RawClient(server, hu) as client:
            error = client.wait()
        seconds = time.perf_counter() - start
        (refused if error else answered).append(seconds)
        messages.update({error} if error else ())

    together([threading.Thread(target=ask) for _ in range(FLOOD)])
    found = {
        "asked": FLOOD,
        "answered": len(answered),
        "refused": len(refused),
        "refused_seconds": percentiles(refused),
        "messages": sorted(messages),
    }
    click.echo(f"full queue: {len(answered)} of {FLOOD} answered, {len(refused)} refused: {'; '.join(messages)}")
    return found


def cancel_waiting(server: RunningServer) -> dict[str, Any]:
    """Fills the queue, cancels all who wait, and asks anew: how soon is there a place again?"""
    hu = phantom_hu(SMALL)
    wait_until(lambda: pending(server) == 0)
    crowd = [RawClient(server, hu) for _ in range(FLOOD)]
    wait_until(lambda: pending(server) > 0)
    before = pending(server)
    start = time.perf_counter()
    for client in crowd:
        client.cancel()
    tries = 0
    while True:
        tries += 1
        with RawClient(server, hu) as newcomer:
            if newcomer.wait() is None:
                break
        time.sleep(POLL_S)
    seconds = time.perf_counter() - start
    for client in crowd:
        client.close()
    wait_until(lambda: pending(server) == 0)
    click.echo(f"cancelled: {before:.0f} waited; a newcomer was answered {seconds:.2f} s later, at try {tries}")
    return {"waiting_before": before, "newcomer_answered_s": seconds, "newcomer_tries": tries}


class RawClient:
    """One request as any client sends it: no trying again, and a handle by which to cancel it."""

    def __init__(self, server: RunningServer, hu: HounsfieldArray) -> None:
        from tritonclient.grpc import InferenceServerClient, InferInput

        ct = InferInput(CT, hu.shape, "INT16")
        ct.set_data_from_numpy(hu)
        self._client = InferenceServerClient(server.url)
        self._done = threading.Event()
        self._error: str | None = None
        self._call = self._client.async_infer(MODEL_NAME, [ct], callback=self._end)

    def _end(self, result: Any, error: Any) -> None:
        self._error = str(error.message()) if error is not None else None
        self._done.set()

    def wait(self) -> str | None:
        """What went wrong, once it has ended."""
        if not self._done.wait(PATIENCE_S):
            return f"no answer within {PATIENCE_S:g} s"
        return self._error

    def cancel(self) -> None:
        """Tells the server that nobody waits any more."""
        self._call.cancel()

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def analyzer_libraries(folder: Path) -> Path:
    """Links to what perf_analyzer needs of the nvidia-pytriton wheel, by the names it knows."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise click.ClickException("perf_analyzer needs libraries of the nvidia-pytriton wheel")
    libraries = folder / "libraries"
    libraries.mkdir()
    for library in (Path(spec.origin).parents[1] / "nvidia_pytriton.libs").iterdir():
        plain = re.sub(r"-[0-9a-f]{8}(?=\.)", "", library.name)
        (libraries / re.sub(r"(libcudart\.so\.\d+)\..*", r"\1", plain)).symlink_to(library)
    return libraries


def analyze(server: RunningServer, program: Path, libraries: Path, at_once: int) -> dict[str, str]:
    """perf_analyzer's own row: the server without our client, so many volumes at once, in shared memory."""
    table = libraries.parent / f"perf-{at_once}.csv"
    options = {
        "-m": MODEL_NAME,
        "-u": server.url,
        "-i": "grpc",
        "--shape": f"{CT}:{','.join(map(str, SMALL))}",
        "--shared-memory": "system",
        "--output-shared-memory-size": str(SMALL[0] * SMALL[1] * SMALL[2]),
        "--concurrency-range": str(at_once),
        "--measurement-mode": "count_windows",
        "--measurement-request-count": str(ANALYZED),
        "--stability-percentage": "999",  # the row is wanted whatever its spread, which stands in it
        "--max-trials": "3",
        "-f": str(table),
    }
    run = subprocess.run(
        [str(program), *(word for option in options.items() for word in option)],
        capture_output=True,
        text=True,
        check=False,
        timeout=ANALYZER_S,
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries)},
    )
    if not table.exists():
        raise click.ClickException(f"perf_analyzer left with {run.returncode}: {(run.stderr or run.stdout)[-400:]}")
    with table.open(newline="") as file:
        (row,) = csv.DictReader(file)
    click.echo(f"perf_analyzer: {at_once} at once, {row['Inferences/Second']} a second, 95 % {row['p95 latency']} us")
    return row


def draw(curves: list[dict[str, Any]]) -> None:
    """The curve of memory as benchmarks/results/load.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        axes.plot(range(1, len(curve["gb"]) + 1), curve["gb"], label=" x ".join(map(str, curve["shape"])))
    axes.set(xlabel="volumes", ylabel="server's resident memory, GB", ylim=(0, None), xscale="log")
    axes.legend()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "load.png", dpi=120)


def pending(server: RunningServer) -> float:
    """How many volumes wait at a server."""
    return metric(server, PENDING)


def wait_until(condition: Any) -> None:
    """Returns once it holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise click.ClickException(f"waited {PATIENCE_S:g} s for the server's queue in vain")
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
