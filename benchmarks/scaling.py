"""Do several servers share the work, and is anything lost when one is killed?

    python -m benchmarks.scaling [--servers 1,2,4] [--volumes 40] [--clients 8]

Real servers on this machine, each on a core of its own while cores last; clients find them as several --url, as one
name for several addresses (gRPC's round robin, as in Kubernetes), or behind nginx with the configuration that ships:
TLS, client certificates and an API key. Prints a table, writes benchmarks/results/scaling.json.
"""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from anatomynet.client.access import NO_ACCESS, Access
from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.errors import ServerError
from anatomynet.engine.volume import HounsfieldArray
from benchmarks.common import machine, write_result
from benchmarks.served import (
    SMALL,
    child_pids,
    metric,
    only_cores,
    percentiles,
    phantom_hu,
    together,
    write_shipped_repository,
)
from tests.tls_proxy import make_certificates, running_proxy
from tests.triton_servers import RunningServer, running_server

KILLED = -9
START_S = 10.0
WAYS = ("several --url", "round robin", "nginx")
# The shipped one is for one department; here it is the servers that are measured.
NO_RATE_LIMIT = {"rate=120r/m": "rate=6000r/m", "rate=50r/s": "rate=5000r/s"}


@dataclass
class Tally:
    """What clients saw, filled by their threads: seconds of answers, what was said when they asked again, errors."""

    seconds: list[float] = field(default_factory=list)
    retold: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: int = 0


@click.command()
@click.option("--servers", default="1,2,4", show_default=True, help="How many, one after the other.")
@click.option("--volumes", default=40, show_default=True, help="Of 64 x 256 x 256, for each row.")
@click.option("--clients", default=8, show_default=True, help="That ask at once.")
def main(servers: str, volumes: int, clients: int) -> None:
    """Measure sharing, throughput, and what a killed server costs."""
    rows = []
    hu = phantom_hu(SMALL)
    for count in map(int, servers.split(",")):
        for way in WAYS:
            for kills in (False, True) if count > 1 else (False,):
                row = measure(hu, count=count, way=way, volumes=volumes, clients=clients, kills=kills)
                rows.append(row)
                click.echo(line_of(row))
    write_result("scaling", {"machine": machine(), "volume": SMALL, "clients": clients, "rows": rows})


def measure(hu: HounsfieldArray, *, count: int, way: str, volumes: int, clients: int, kills: bool) -> dict[str, Any]:
    """One row: that many servers, all of them started anew."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        running = started(stack, folder, count, kills=kills)
        urls, access = stack.enter_context(addresses(running, way, folder))
        with TritonRuntime(*urls, shared_memory="off", wait_s=START_S, access=access) as runtime:
            expected, _ = runtime.infer(hu)
        before = [answered(server) for server in running]
        tally = Tally()
        killer = threading.Thread(target=kill_halfway, args=(running[0], tally, volumes)) if kills else None
        threads = [
            threading.Thread(target=ask, args=(urls, access, hu, expected, tally, len(range(k, volumes, clients))))
            for k in range(clients)
        ]
        wall = together([*threads, *filter(None, [killer])])
        survivors = zip(running[kills:], before[kills:], strict=True)
        shares = [answered(server) - earlier for server, earlier in survivors]
    return {
        "servers": count,
        "way": way,
        "one_killed": kills,
        "per_minute": 60 * len(tally.seconds) / wall,
        "seconds": percentiles(tally.seconds),
        "shares": shares,
        "answered": len(tally.seconds),
        "asked_again": len(tally.retold),
        "lost": tally.lost,
        "wrong": tally.wrong,
    }


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    name = f"{row['servers']} servers, {row['way']}{', one killed' if row['one_killed'] else ''}"
    return (
        f"{name:<38}{row['per_minute']:7.1f} a minute  p95 {row['seconds']['p95']:5.2f} s  shares {row['shares']}  "
        f"asked again {row['asked_again']}  lost {len(row['lost'])}  wrong {row['wrong']}"
    )


def started(stack: ExitStack, folder: Path, count: int, *, kills: bool) -> list[RunningServer]:
    """Servers, each with a repository of its own on a core of its own; they share where there are more than cores."""
    cores = sorted(os.sched_getaffinity(0))
    running = []
    for i in range(count):
        home = folder / str(i)
        home.mkdir()
        repository = write_shipped_repository(home / "repository")
        with only_cores({cores[i % len(cores)]}):
            status = KILLED if kills and i == 0 else 0
            running.append(stack.enter_context(running_server(repository, folder=home, status=status)))
    return running


@contextmanager
def addresses(running: Sequence[RunningServer], way: str, folder: Path) -> Iterator[tuple[list[str], Access]]:
    """What a client is told: each server, one name for all of them, or a proxy before them and what opens it."""
    urls = [server.url for server in running]
    if way == "nginx":
        (folder / "proxy").mkdir()
        certificates = make_certificates(folder)
        with running_proxy(folder / "proxy", certificates, urls, changes=NO_RATE_LIMIT) as proxy:
            yield [proxy.url], certificates.access()
    else:
        yield urls if way == "several --url" else [f"ipv4:{','.join(urls)}"], NO_ACCESS


def ask(
    urls: list[str], access: Access, hu: HounsfieldArray, expected: NDArray[np.uint8], tally: Tally, count: int
) -> None:
    """One client: so many volumes one after the other."""
    with TritonRuntime(*urls, shared_memory="off", tell=tally.retold.append, access=access) as runtime:
        for _ in range(count):
            start = time.perf_counter()
            try:
                labels, _ = runtime.infer(hu)
            except ServerError as error:
                tally.lost.append(str(error))
            else:
                tally.seconds.append(time.perf_counter() - start)
                tally.wrong += int(not np.array_equal(labels, expected))


def kill_halfway(server: RunningServer, tally: Tally, volumes: int) -> None:
    """SIGKILL to all of it, as to a machine that loses power."""
    while len(tally.seconds) + len(tally.lost) < volumes // 2:
        time.sleep(0.02)
    triton = child_pids(server.process.pid)
    stubs = [stub for pid in triton for stub in child_pids(pid)]
    for pid in (server.process.pid, *triton, *stubs):
        with suppress(ProcessLookupError):  # Triton goes with its launcher
            os.kill(pid, signal.SIGKILL)


def answered(server: RunningServer) -> int:
    """How many volumes a server has answered since its start; 0 where it is gone."""
    if server.process.poll() is not None:
        return 0
    return int(metric(server, "nv_inference_request_success"))


if __name__ == "__main__":
    main()
