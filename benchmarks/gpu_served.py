"""The part `served` of benchmarks.gpu: whole volumes to a real server and back, from several clients at once."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.runtime import Runtime
from anatomynet.engine.volume import HounsfieldArray
from anatomynet.export.repository import write_repository
from anatomynet.export.triton_models import python_model
from benchmarks.gpu_server import gpu_memory_mib, runtime_line, served_on_gpu
from benchmarks.gpu_trial import WARM_UPS, Row, Trial
from benchmarks.served import percentiles
from benchmarks.volume_steps import client_steps, server_steps
from tests.triton_servers import RunningServer


def measure_served(trial: Trial) -> None:
    """The real server over shared memory: seconds of a volume, volumes a second, memory of the GPU."""
    from anatomynet.export.onnx import network_model, served_model, write_onnx

    network, config = load_checkpoint(trial.checkpoint)
    file = trial.folder / f"{config.name}-fp32.onnx"
    write_onnx(served_model(network_model(network), config, fp16=False), file)
    repository = trial.folder / "repository"
    write_repository(repository, [python_model(config, [file], checkpoint=trial.checkpoint)])
    rows: dict[str, Row] = {}
    with served_on_gpu(trial, "served", repository) as server, connections(server.url, max(trial.clients)) as all_:
        trial.result["served_on"] = runtime_line(server)
        for runtime in all_[:1] * WARM_UPS:  # the size is new to it
            runtime.infer(trial.hu)
        for count in trial.clients:
            row = ask_at_once(server, all_[:count], trial.hu, trial.repeats)
            rows[f"{count} clients"] = row | {"gpu_mib": gpu_memory_mib()}
            trial.result["served"] = rows


def ask_at_once(server: RunningServer, clients: Sequence[Runtime], hu: HounsfieldArray, repeats: int) -> Row:
    """So many volumes of each client: seconds of one, volumes a second, and milliseconds of each step on both sides."""
    with server_steps(server) as server_ms, client_steps() as client_ms:
        start = time.perf_counter()
        with ThreadPoolExecutor(len(clients)) as pool:
            runs = pool.map(lambda client: _timed(client, hu, repeats), clients)
            seconds = [s for each in runs for s in each]
        volumes_a_second = len(seconds) / (time.perf_counter() - start)
        steps = {"server_ms": server_ms(len(seconds)), "client_ms": client_ms()}
    return {**percentiles(seconds), "volumes_a_second": volumes_a_second, **steps}


@contextmanager
def connections(url: str, count: int) -> Iterator[list[TritonRuntime]]:
    """So many clients of one server."""
    runtimes = [TritonRuntime(url, timeout_s=60.0) for _ in range(count)]
    try:
        yield runtimes
    finally:
        for runtime in runtimes:
            runtime.close()


def _timed(runtime: Runtime, hu: HounsfieldArray, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        runtime.infer(hu)
        seconds.append(time.perf_counter() - start)
    return seconds
