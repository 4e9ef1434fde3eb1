"""Where the time of a volume in shared memory goes: the server's steps by its own metrics, the client's by a clock.

The client has no clock of its own there, so what it calls for each step is wrapped while it is timed.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from anatomynet.client.region_keeper import RegionKeeper
from anatomynet.client.shared_memory import SharedRegion
from anatomynet.client.triton_server import TritonServer
from benchmarks.served import metric
from tests.triton_servers import RunningServer
from tests.waiting import wait_until

REQUESTS = "nv_inference_request_success"
# Triton's names for a request's way through it, each the sum of all requests since its start; "all" is the whole way.
SERVER_STEPS = {
    "queue": "nv_inference_queue_duration_us",
    "input": "nv_inference_compute_input_duration_us",
    "infer": "nv_inference_compute_infer_duration_us",
    "output": "nv_inference_compute_output_duration_us",
    "all": "nv_inference_request_duration_us",
}
SETTLED_S = 0.1  # a server counts a request a moment after its answer has left
TAKE, KEEP = "take a region", "keep the region"
# The others of the client's steps: what it calls for each.
CLIENT_CALLS: dict[str, tuple[type, str]] = {
    "write": (SharedRegion, "write"),
    "wait for the answer": (TritonServer, "_ask"),
    "read": (SharedRegion, "read_labels"),
    "ask for the model": (TritonServer, "ask_model"),
}


@contextmanager
def server_steps(server: RunningServer) -> Iterator[Callable[[int], dict[str, float]]]:
    """What is handed out tells the milliseconds of a request, a mean, of so many since the block began; no one else may
    ask the server meanwhile."""
    time.sleep(SETTLED_S)
    before = {name: metric(server, name) for name in (REQUESTS, *SERVER_STEPS.values())}

    def milliseconds(requests: int) -> dict[str, float]:
        counted = f"{requests} volumes in the server's metrics"
        wait_until(lambda: metric(server, REQUESTS) - before[REQUESTS] >= requests, counted)
        return {step: (metric(server, name) - before[name]) / requests / 1000 for step, name in SERVER_STEPS.items()}

    yield milliseconds


@contextmanager
def client_steps() -> Iterator[Callable[[], dict[str, float]]]:
    """What is handed out tells the median milliseconds of each step of this process' clients since the block began."""
    taken: dict[str, list[float]] = {step: [] for step in (TAKE, *CLIENT_CALLS, KEEP)}
    with ExitStack() as stack:
        stack.enter_context(patch.object(RegionKeeper, "region_for", _timed_block(RegionKeeper.region_for, taken)))
        for step, (owner, name) in CLIENT_CALLS.items():
            stack.enter_context(patch.object(owner, name, _timed(getattr(owner, name), taken[step])))
        yield lambda: {step: 1000 * statistics.median(seconds) for step, seconds in taken.items() if seconds}


def _timed(function: Callable[..., Any], taken: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments, **options)
        taken.append(time.perf_counter() - start)
        return result

    return timed


def _timed_block(
    block: Callable[..., AbstractContextManager[Any]], taken: dict[str, list[float]]
) -> Callable[..., AbstractContextManager[Any]]:
    @contextmanager
    def timed(*arguments: Any, **options: Any) -> Iterator[Any]:
        start = time.perf_counter()
        with block(*arguments, **options) as value:
            taken[TAKE].append(time.perf_counter() - start)
            yield value
            start = time.perf_counter()
        taken[KEEP].append(time.perf_counter() - start)

    return timed
