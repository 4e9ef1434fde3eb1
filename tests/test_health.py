"""client/health.py against real servers: well and alive, drawing nonsense, busy, dead."""

import os
import queue
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from anatomynet.client.cli import main
from anatomynet.client.connection import ServerOptions
from anatomynet.client.health import LOWEST_DSC, Status, check_health, phantom_geometry, probe_runtime
from anatomynet.engine.config import ModelConfig, load_config, shipped_weights
from anatomynet.engine.errors import ServerError
from anatomynet.engine.runtime import Runtime, load_runtime
from anatomynet.export.repository import write_repository
from anatomynet.export.triton_models import LARGEST_QUEUE, python_model
from tests.random_network import smooth_hu
from tests.triton_servers import (
    RunningServer,
    ServerStarter,
    free_ports,
    has_server,
    model_process,
    running_server,
    unwatched,
)
from tests.waiting import WAIT_TIMEOUT_S, wait_until

grpc = pytest.importorskip("tritonclient.grpc")

# Of openkbp7, the oesophagus alone lies too low for the phantom, the larynx at its end.
JUDGED = {"BrainStem", "SpinalCord", "Parotid_R", "Parotid_L", "Mandible"}
SHAPE = (8, 32, 32)
NAGIOS_LINE = re.compile(
    r"ANATOMYNET (OK|WARNING|CRITICAL) - [^|\n]+(\| seconds=[\d.]+s lowest_dsc=[\d.]+;;0\.5:;0;1)?\n"
)


def info(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["info", *arguments])


@pytest.fixture(scope="module")
def embedded() -> Runtime:
    """The shipped checkpoint in this process."""
    return load_runtime()


def write_shipped(folder: Path) -> Path:
    """A repository that serves the shipped checkpoint."""
    onnx_file = shipped_weights(".onnx")
    write_repository(folder, [python_model(load_runtime(onnx_file).model, [onnx_file])])
    return folder


@pytest.fixture(scope="module")
def shipped_server(start_server: ServerStarter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with start_server(write_shipped(tmp_path_factory.mktemp("shipped") / "triton_repo")) as server:
        yield server


# --- the probe


def test_the_shipped_checkpoint_passes(embedded: Runtime) -> None:
    probe = probe_runtime(embedded)
    assert set(probe.dsc) == JUDGED
    assert probe.passed
    assert probe.shape == phantom_geometry(embedded.model).shape


class Mirrored:
    """The shipped network, whose answer is turned left to right: sides in place, labels swapped."""

    description = "mirrored"

    def __init__(self, runtime: Runtime) -> None:
        self.model = runtime.model
        self._runtime = runtime

    def infer(self, hu: NDArray[np.int16]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        labels, confidence = self._runtime.infer(hu)
        right, left = (self.model.structures.index(name) + 1 for name in ("Parotid_R", "Parotid_L"))
        swap = np.arange(256, dtype=np.uint8)
        swap[[right, left]] = left, right
        return swap[labels], confidence


def test_swapped_sides_do_not_pass(embedded: Runtime) -> None:
    probe = probe_runtime(Mirrored(embedded))
    assert not probe.passed
    assert {name for name, dsc in probe.dsc.items() if dsc < LOWEST_DSC} == {"Parotid_R", "Parotid_L"}
    assert "2 of 5 structures not where they should be" in probe.verdict


def test_a_model_of_small_structures_alone_is_not_called_healthy(embedded: Runtime) -> None:
    class Chiasm:
        description = "chiasm alone"
        model = ModelConfig("small", ("Chiasm",), 4, (1.0, 1.0, 2.0), (1.2, 1.2, 3.0), (-250.0, 550.0))

        def infer(self, hu: NDArray[np.int16]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
            return np.zeros(hu.shape, np.uint8), np.zeros(1, np.float32)

    probe = probe_runtime(Chiasm())
    assert not probe.passed
    assert "to judge by" in probe.verdict


def test_the_phantom_has_the_models_own_spacing() -> None:
    for name in ("openkbp7", "oar9"):
        model, _ = load_config(name)
        assert phantom_geometry(model).spacing == model.largest_spacing


# --- the command


def test_info_shows_what_answers_and_a_timed_probe(shipped_server: RunningServer, embedded: Runtime) -> None:
    result = info("--url", shipped_server.url)
    assert result.exit_code == 0, result.output
    assert f"Triton 2.51.0 at {shipped_server.url}" in result.output
    assert f"checkpoint sha256: {embedded.model.checkpoint_sha256}" in result.output
    assert "shared memory: open" in result.output
    assert re.search(r"probe: \d+ x \d+ x \d+ voxels in \d+\.\d\d s, 5 structures where they should be", result.output)


def test_check_of_a_healthy_server(shipped_server: RunningServer) -> None:
    result = info("--check", "--url", shipped_server.url)
    assert result.exit_code == Status.OK, result.output
    assert NAGIOS_LINE.fullmatch(result.output)
    assert "5 structures where they should be" in result.output


def test_check_of_a_server_that_draws_nonsense(triton_server: RunningServer) -> None:
    """The random network is READY and answers; only a look at the answer tells."""
    result = info("--check", "--url", triton_server.url)
    assert result.exit_code == Status.CRITICAL
    assert NAGIOS_LINE.fullmatch(result.output)
    assert "not where they should be" in result.output


def test_check_where_no_server_is() -> None:
    result = info("--check", "--url", f"127.0.0.1:{free_ports(1)[0]}")
    assert result.exit_code == Status.CRITICAL
    assert NAGIOS_LINE.fullmatch(result.output)
    assert "no Triton server" in result.output


def test_check_of_a_busy_server_is_a_warning(triton_server: RunningServer) -> None:
    """One volume is computed, and the queue holds as many more as it takes."""
    ct = grpc.InferInput("CT", SHAPE, "INT16")
    ct.set_data_from_numpy(smooth_hu(SHAPE))
    outcomes = queue.SimpleQueue[Any]()
    asked = 2 + LARGEST_QUEUE
    with grpc.InferenceServerClient(triton_server.url) as client:
        with triton_server.holding() as is_computing:
            client.async_infer("anatomynet", [ct], lambda result, error: outcomes.put(error))
            wait_until(is_computing)
            for _ in range(asked - 1):
                client.async_infer("anatomynet", [ct], lambda result, error: outcomes.put(error))
            assert outcomes.get(timeout=WAIT_TIMEOUT_S)  # one too many
            assert check_health(ServerOptions(urls=(triton_server.url,))).status is Status.WARNING
        assert [outcomes.get(timeout=WAIT_TIMEOUT_S) for _ in range(asked - 1)] == [None] * (asked - 1)


def test_check_asks_a_server_found_on_this_machine_but_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was named: a probe that waits for a busy server is a probe that fails."""
    asked: list[bool] = []

    def probe(*, retries: bool) -> Runtime | None:
        asked.append(retries)
        raise ServerError("stop here")

    monkeypatch.setattr("anatomynet.client.connection.probe_local", probe)
    assert check_health(ServerOptions()).status is Status.CRITICAL
    assert asked == [False]


def test_check_tells_of_a_model_that_died_while_the_server_says_ready(tmp_path: Path) -> None:
    """Such a server, without the launcher, does not even stop in time; hence the status."""
    if not has_server():
        pytest.skip("no tritonserver here: pip install 'anatomynet[serve]'")
    repository = write_shipped(tmp_path / "triton_repo")
    with running_server(
        repository, "--exit-timeout-secs=1", folder=tmp_path, status=1, program=unwatched(tmp_path)
    ) as server:
        os.kill(model_process(server.process.pid), signal.SIGKILL)
        result = info("--check", "--url", server.url)
        assert result.exit_code == Status.CRITICAL
        assert "restart tritonserver" in result.output
        with grpc.InferenceServerClient(server.url) as client:
            assert client.is_server_ready()
            assert client.is_model_ready("anatomynet")


def test_shared_memory_that_is_closed_is_told(start_server: ServerStarter, random_repository: Path) -> None:
    with start_server(random_repository, "--grpc-restricted-protocol=shared-memory:key=secret") as server:
        assert "shared memory: closed" in info("--url", server.url).output
