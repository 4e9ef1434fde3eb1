"""What goes wrong in a clinic, done to real servers: whatever fails, no study is lost and none is wrong."""

import dataclasses
import json
import queue
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from anatomynet.client import region_keeper
from anatomynet.client.triton import TritonRuntime
from anatomynet.client.triton_server import Answer, TritonServer
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import ServerBusyError, ServerError
from anatomynet.engine.runtime import Runtime, load_runtime
from anatomynet.export.keeper import REGION_PREFIX, SHARED_MEMORY
from anatomynet.export.triton_models import LARGEST_QUEUE
from tests.breakable_server import BreakableServer, two_servers
from tests.garbage import damaged_messages, deadly_body, deadly_message, grpc_garbage, http_garbage, say
from tests.random_network import smooth_hu
from tests.shared_regions import assert_none_is_left, has_named_region, registered_regions
from tests.triton_servers import RunningServer, answered_since, has_server, running_server, volumes_answered
from tests.waiting import wait_until

grpc = pytest.importorskip("tritonclient.grpc")
utils = pytest.importorskip("tritonclient.utils")
pytestmark = pytest.mark.skipif(not has_server(), reason="no tritonserver here: pip install 'anatomynet[serve]'")

SHAPE = (24, 96, 128)
WAIT_S = 60
LOADS = "loading: anatomynet:1"  # in the server's log
Way = Literal["on", "off"]
WAYS: tuple[Way, ...] = ("on", "off")
FUZZ_SEED = 1808
FUZZED_HTTP = 3000
FUZZED_GRPC = 3000
# Bytes that are sent in truth, three times the largest volume that a clinic has.
OVERSIZED = 300 * 10**6
OVERSIZED_TIMES = 3
ANEW = "starting Triton anew"


@pytest.fixture(scope="module")
def embedded(random_onnx_files: tuple[Path, Path]) -> Runtime:
    return load_runtime(random_onnx_files[0])


@pytest.fixture(scope="module")
def _servers(random_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[BreakableServer]]:
    with two_servers(random_repository, tmp_path_factory.mktemp("servers")) as servers:
        yield servers


@pytest.fixture
def server(_servers: list[BreakableServer]) -> BreakableServer:
    """READY; it may be broken, the next test gets it mended."""
    _servers[0].ensure_running()
    return _servers[0]


@pytest.fixture
def second_server(_servers: list[BreakableServer]) -> BreakableServer:
    """Serves the same model."""
    _servers[1].ensure_running()
    return _servers[1]


@pytest.fixture(scope="module")
def another_model(
    random_model_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelConfig, Path]:
    """Of another checkpoint: its configuration, and its folder in a repository."""
    from anatomynet.export.onnx import served_model, write_onnx
    from anatomynet.export.repository import write_repository
    from anatomynet.export.triton_models import python_model
    from tests.random_network import random_graph

    config = dataclasses.replace(random_model_config, checkpoint_sha256="0ddba11" + "0" * 57)
    folder = tmp_path_factory.mktemp("another")
    write_onnx(served_model(random_graph(), config, fp16=False), folder / "anatomynet.onnx")
    write_repository(folder / "triton_repo", [python_model(config, [folder / "anatomynet.onnx"])])
    return config, folder / "triton_repo" / "anatomynet"


def in_background(work: Callable[[], Any]) -> "Future[Any]":
    """As an executor's, but a test that fails does not wait for it."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - the test that asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def assert_answers(server: BreakableServer, embedded: Runtime) -> None:
    """A good request, the right answer."""
    hu = smooth_hu(SHAPE)
    with TritonRuntime(server.url, retries=False) as runtime:
        np.testing.assert_array_equal(runtime.infer(hu)[0], embedded.infer(hu)[0])


# --- a server that dies, restarts, stops


@pytest.mark.parametrize("way", WAYS)
def test_killed_in_the_middle_and_started_again(server: BreakableServer, embedded: Runtime, way: Way) -> None:
    hu, told = smooth_hu(SHAPE), queue.SimpleQueue[str]()
    with TritonRuntime(server.url, shared_memory=way, tell=told.put) as runtime:
        with server.holding() as is_computing:
            answer = in_background(lambda: runtime.infer(hu))
            wait_until(is_computing)
            server.kill()
        assert "trying again in" in told.get(timeout=WAIT_S)
        server.start()
        np.testing.assert_array_equal(answer.result(WAIT_S)[0], embedded.infer(hu)[0])
        assert f"by {'shared memory' if way == 'on' else 'gRPC'}," in runtime.description
    assert_none_is_left()


def test_restarted_between_two_volumes(
    server: BreakableServer, embedded: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one does not know the regions that were kept; that is nothing that a user has to know, or to wait for."""
    monkeypatch.setattr(region_keeper, "KEPT_S", 3600.0)
    hu = smooth_hu(SHAPE)
    with TritonRuntime(server.url, shared_memory="on", retries=False) as runtime:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(runtime.infer, [hu, hu]))
        assert registered_regions(server.url)
        server.kill()
        server.start()
        wait_until(runtime.is_shared_memory_open, "the connection is back")
        np.testing.assert_array_equal(runtime.infer(hu)[0], embedded.infer(hu)[0])
        assert len(registered_regions(server.url)) == 1
    assert registered_regions(server.url) == set()


def test_sigterm_lets_what_was_accepted_finish(server: BreakableServer, embedded: Runtime) -> None:
    """Without the question that follows a volume: the server may be gone by then."""
    volumes = [smooth_hu(SHAPE, seed=seed) for seed in range(2)]
    with closing(TritonServer(server.url, shared_memory="auto", answer_timeout_s=WAIT_S)) as asked:
        infer = partial(asked.infer, structures=len(embedded.model.structures), timeout_s=WAIT_S)
        with server.holding() as is_computing:
            computing = in_background(lambda: infer(volumes[0]))
            wait_until(is_computing)
            waiting = in_background(lambda: infer(volumes[1]))
            wait_until(lambda: server.waiting_requests() == 1)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "in-flight" in server.log.read_text(), "the server has heard of its end")
        for hu, answer in zip(volumes, (computing, waiting), strict=True):
            np.testing.assert_array_equal(answer.result(WAIT_S)[0], embedded.infer(hu)[0])
    assert server.process.wait(WAIT_S) == 0


def test_an_answer_whose_model_can_no_longer_be_asked_is_drawn_again(
    server: BreakableServer, second_server: BreakableServer, embedded: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another checkpoint may have been loaded before the server died: that answer is not trusted."""
    hu, told, answered = smooth_hu(SHAPE), list[str](), list[str]()
    servers = {each.url: each for each in (server, second_server)}
    infer = TritonServer.infer

    def infer_and_die_once(asked: TritonServer, *args: Any, **options: Any) -> Answer:
        answer = infer(asked, *args, **options)
        if not answered:
            servers[asked.url].kill()
        answered.append(asked.url)
        return answer

    monkeypatch.setattr(TritonServer, "infer", infer_and_die_once)
    with TritonRuntime(*servers, tell=told.append) as runtime:
        np.testing.assert_array_equal(runtime.infer(hu)[0], embedded.infer(hu)[0])
    assert sorted(answered) == sorted(servers)
    assert len(told) == 1
    assert "going on to the next server" in told[0]


def test_a_server_that_is_just_starting_is_waited_for(server: BreakableServer) -> None:
    server.kill()
    told = queue.SimpleQueue[str]()
    opened = in_background(lambda: TritonRuntime(server.url, wait_s=WAIT_S, tell=told.put))
    assert "trying again" in told.get(timeout=WAIT_S)
    server.start()
    opened.result(WAIT_S).close()


def test_who_stays_away_is_given_up_in_time(server: BreakableServer) -> None:
    with TritonRuntime(server.url, timeout_s=5) as runtime:
        server.kill()
        with pytest.raises(ServerError, match=r"refused|closed|reset") as caught:
            runtime.infer(smooth_hu(SHAPE))
    assert "\n" not in str(caught.value)


# --- a model that is loaded anew, or dies


def test_a_reload_loses_nothing(server: BreakableServer, embedded: Runtime) -> None:
    volumes, loads = [smooth_hu(SHAPE, seed=seed) for seed in range(5)], server.log.read_text().count(LOADS)
    with TritonRuntime(server.url) as runtime, grpc.InferenceServerClient(server.url) as client:
        with server.holding() as is_computing:
            answers = [in_background(partial(runtime.infer, hu)) for hu in volumes]
            wait_until(lambda: is_computing() and server.waiting_requests() == len(volumes) - 1)
            (server.repository / "anatomynet" / "config.pbtxt").touch()  # what has not changed is not loaded anew
            reloaded = in_background(lambda: client.load_model("anatomynet"))
            wait_until(lambda: server.log.read_text().count(LOADS) > loads, "the server loads the model anew")
        for hu, answer in zip(volumes, answers, strict=True):
            np.testing.assert_array_equal(answer.result(WAIT_S)[0], embedded.infer(hu)[0])
        reloaded.result(WAIT_S)
    server.kill()  # its stub is another now


def test_an_unloaded_model_is_waited_for(server: BreakableServer, embedded: Runtime) -> None:
    hu, told = smooth_hu(SHAPE), queue.SimpleQueue[str]()
    with TritonRuntime(server.url, tell=told.put) as runtime, grpc.InferenceServerClient(server.url) as client:
        client.unload_model("anatomynet")
        answer = in_background(lambda: runtime.infer(hu))
        assert "trying again" in told.get(timeout=WAIT_S)
        client.load_model("anatomynet")
        np.testing.assert_array_equal(answer.result(WAIT_S)[0], embedded.infer(hu)[0])
    server.kill()


def test_a_damaged_model_is_not_taken_and_the_old_one_serves_on(server: BreakableServer, embedded: Runtime) -> None:
    file = next((server.repository / "anatomynet" / "1").glob("*.onnx"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    try:
        with (
            grpc.InferenceServerClient(server.url) as client,
            pytest.raises(utils.InferenceServerException, match="damaged"),
        ):
            client.load_model("anatomynet")
        assert_answers(server, embedded)
    finally:
        file.write_bytes(whole)


def test_another_model_in_the_middle_is_told_and_then_used(
    server: BreakableServer, embedded: Runtime, another_model: tuple[ModelConfig, Path]
) -> None:
    config, folder = another_model
    hu = smooth_hu(SHAPE)
    ours = server.repository / "anatomynet"
    kept = ours.rename(server.repository.with_name("kept"))
    shutil.copytree(folder, ours)
    try:
        with TritonRuntime(server.url) as runtime, grpc.InferenceServerClient(server.url) as client:
            client.load_model("anatomynet")
            with pytest.raises(ServerError, match=r"has changed from checkpoint 5eed.* to 0ddba11.*again"):
                runtime.infer(hu)
            np.testing.assert_array_equal(runtime.infer(hu)[0], embedded.infer(hu)[0])
            assert runtime.model == config
    finally:
        server.kill()
        shutil.rmtree(ours)
        kept.rename(ours)


def test_a_dead_model_is_told_although_it_says_ready(server: BreakableServer) -> None:
    with TritonRuntime(server.url) as runtime, grpc.InferenceServerClient(server.url) as client:
        server.kill_model()
        with pytest.raises(ServerError, match=r"Stub process .*restart tritonserver"):
            runtime.infer(smooth_hu(SHAPE))
        assert client.is_model_ready("anatomynet")
    server.kill()


# --- several servers


def test_of_two_servers_one_dies_and_no_study_is_lost(
    server: BreakableServer, second_server: BreakableServer, embedded: Runtime
) -> None:
    volumes = [smooth_hu(SHAPE, seed=seed) for seed in range(8)]
    told: list[str] = []
    with TritonRuntime(server.url, second_server.url, tell=told.append) as runtime, ThreadPoolExecutor(4) as threads:
        with server.holding() as is_computing:
            answers = [threads.submit(runtime.infer, hu) for hu in volumes]
            wait_until(is_computing)
            server.kill()
        for hu, answer in zip(volumes, answers, strict=True):
            np.testing.assert_array_equal(answer.result(WAIT_S)[0], embedded.infer(hu)[0])
    assert any(server.url in line and "going on to the next server" in line for line in told)


def test_volumes_go_to_the_servers_in_turn(server: BreakableServer, second_server: BreakableServer) -> None:
    urls = (server.url, second_server.url)
    before = volumes_answered(*urls)
    with TritonRuntime(server.url, second_server.url) as runtime:
        for _ in range(4):
            runtime.infer(smooth_hu(SHAPE))
    assert answered_since(before, *urls, volumes=4) == [2, 2]


def test_of_two_servers_one_is_not_there(second_server: BreakableServer, embedded: Runtime) -> None:
    told: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as unused:
        nobody = f"127.0.0.1:{unused.getsockname()[1]}"
    hu = smooth_hu(SHAPE)
    with TritonRuntime(nobody, second_server.url, tell=told.append) as runtime:
        np.testing.assert_array_equal(runtime.infer(hu)[0], embedded.infer(hu)[0])
    assert told[0].startswith(nobody)
    assert "going on without it" in told[0]


@pytest.mark.parametrize("fault", ["its model is dead", "it hangs"])
def test_of_two_servers_one_does_not_compute(
    server: BreakableServer, second_server: BreakableServer, embedded: Runtime, fault: str
) -> None:
    hu = smooth_hu(SHAPE)
    with TritonRuntime(server.url, second_server.url, timeout_s=8) as runtime:
        if fault == "it hangs":
            with server.frozen():
                answers = [runtime.infer(hu) for _ in range(2)]
        else:
            server.kill_model()
            answers = [runtime.infer(hu) for _ in range(2)]
            server.kill()
    for label_map, _ in answers:
        np.testing.assert_array_equal(label_map, embedded.infer(hu)[0])


def test_servers_of_two_checkpoints_are_refused(
    server: BreakableServer, second_server: BreakableServer, another_model: tuple[ModelConfig, Path]
) -> None:
    second_server.kill()
    ours = second_server.repository / "anatomynet"
    kept = ours.rename(second_server.repository.with_name("kept"))
    shutil.copytree(another_model[1], ours)
    try:
        second_server.start()
        with pytest.raises(ServerError, match=r"checkpoint 5eed.* 0ddba11.*: expected the same model on all servers"):
            TritonRuntime(server.url, second_server.url)
    finally:
        second_server.kill()
        shutil.rmtree(ours)
        kept.rename(ours)


# --- queues


def test_a_full_queue_is_waited_for_or_told(server: BreakableServer, embedded: Runtime) -> None:
    hu, told = smooth_hu(SHAPE), queue.SimpleQueue[str]()
    with (
        TritonRuntime(server.url) as crowd,
        TritonRuntime(server.url, retries=False) as hasty,
        TritonRuntime(server.url, tell=told.put) as patient,
    ):
        with server.holding() as is_computing:
            answers = [in_background(lambda: crowd.infer(hu)) for _ in range(1 + LARGEST_QUEUE)]
            wait_until(lambda: is_computing() and server.waiting_requests() == LARGEST_QUEUE)
            with pytest.raises(ServerBusyError, match="it is busy: try again later"):
                hasty.infer(hu)
            answers.append(in_background(lambda: patient.infer(hu)))
            assert "it is busy" in told.get(timeout=WAIT_S)
        for answer in answers:
            np.testing.assert_array_equal(answer.result(WAIT_S)[0], embedded.infer(hu)[0])


def test_who_stops_waiting_frees_the_queue(server: BreakableServer, embedded: Runtime) -> None:
    before, hu = volumes_answered(server.url), smooth_hu(SHAPE)
    with TritonRuntime(server.url) as patient, TritonRuntime(server.url, timeout_s=0.2) as hasty:
        with server.holding() as is_computing:
            answer = in_background(lambda: patient.infer(hu))
            wait_until(is_computing)
            given_up = [in_background(lambda: hasty.infer(hu)) for _ in range(LARGEST_QUEUE)]
            for each in given_up:
                assert isinstance(each.exception(WAIT_S), ServerError)
        np.testing.assert_array_equal(answer.result(WAIT_S)[0], embedded.infer(hu)[0])
    wait_until(lambda: server.waiting_requests() == 0, "an empty queue")
    assert_answers(server, embedded)
    # Nobody's volume was computed but those that were waited for.
    assert answered_since(before, server.url, volumes=2) == [2]


# --- shared memory


CLIENT = f"""
import sys, numpy as np
from anatomynet.client.triton import TritonRuntime
runtime = TritonRuntime(sys.argv[1], shared_memory="on", connect_timeout_s=60)
print("asks", flush=True)
sys.stdin.readline()
runtime.infer(np.zeros({SHAPE}, np.int16))
"""


def started_client(server: BreakableServer) -> "subprocess.Popen[bytes]":
    """Connected; draws once it is told to."""
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, server.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert client.stdout is not None
    assert client.stdout.readline() == b"asks\n"
    return client


def test_a_client_that_is_killed_while_its_region_has_a_name_leaves_nothing(
    server: BreakableServer, embedded: Runtime
) -> None:
    with started_client(server) as client, server.frozen():  # so that the region is not registered, and keeps its name
        assert client.stdin is not None
        client.stdin.write(b"\n")
        client.stdin.flush()
        wait_until(lambda: has_named_region(client.pid) or client.poll() is not None, "a region with a name")
        assert client.poll() is None, client.communicate()
        client.kill()
        assert_none_is_left()
    assert_answers(server, embedded)


def test_a_client_that_is_killed_while_its_region_is_registered_harms_nobody(
    server: BreakableServer, embedded: Runtime
) -> None:
    with started_client(server) as client, server.holding() as is_computing:
        assert client.stdin is not None
        client.stdin.write(b"\n")
        client.stdin.flush()
        wait_until(is_computing)
        client.kill()
        assert_none_is_left()
    assert_answers(server, embedded)


# 40 MB are too little for a region that is kept, another one, and the server's own memory of that volume, enough for
# two of the three; too little for the region and the server's own memory of the next volume, enough for the latter
# alone; and too little for the last.
FULL_SHARED_MEMORY = """
import sys
from pathlib import Path
from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.errors import ServerError
from tests.breakable_server import BreakableServer
from tests.garbage import damaged_messages, deadly_body, deadly_message, grpc_garbage, http_garbage, say
import numpy as np
server = BreakableServer(Path(sys.argv[1]), Path(sys.argv[2]))
server.start()
try:
    with TritonRuntime(server.url) as first, TritonRuntime(server.url) as second:
        for runtime in (first, second):
            runtime.infer(np.zeros((20, 512, 512), np.int16))
        print("by shared memory" in first.description, "by shared memory" in second.description)
    with TritonRuntime(server.url) as runtime:
        label_map, _ = runtime.infer(np.zeros((32, 512, 512), np.int16))
        print(label_map.shape, "by gRPC" in runtime.description)
    with TritonRuntime(server.url) as runtime:
        try:
            runtime.infer(np.zeros((64, 512, 512), np.int16))
        except ServerError as error:
            print(error)
    with TritonRuntime(server.url) as runtime:
        print(runtime.infer(np.zeros((24, 96, 128), np.int16))[0].shape)
finally:
    server.kill()
print(*(path.name for path in Path("/dev/shm").iterdir()))
"""


def test_full_shared_memory(random_repository: Path, tmp_path: Path) -> None:
    alone = ["unshare", "--map-root-user", "--mount"]
    small = "mount -t tmpfs -o size=40m tmpfs /dev/shm"
    if subprocess.run([*alone, "sh", "-c", small], capture_output=True, check=False).returncode:
        pytest.skip("a small /dev/shm takes a mount namespace")
    python = [sys.executable, "-c", FULL_SHARED_MEMORY]
    run = subprocess.run(
        [*alone, "sh", "-c", f'{small} && exec "$0" "$@"', *python, random_repository, tmp_path],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    kept, first, second, third, left = run.stdout.split("\n")[:5]
    assert kept == "True True"
    assert first == "(32, 512, 512) True"
    assert "/dev/shm is full" in second
    assert third == "(24, 96, 128)"
    assert left == ""


# --- what no client sends


def test_garbage_on_the_http_port(server: BreakableServer, embedded: Runtime) -> None:
    rng = random.Random(FUZZ_SEED)
    voxels = smooth_hu((8, 32, 32)).tobytes()
    head = (
        b'{"inputs":[{"name":"CT","datatype":"INT16","shape":[8,32,32],"parameters":{"binary_data_size":%d}}],'
        b'"outputs":[{"name":"LABEL_MAP","parameters":{"binary_data":true}}]}' % len(voxels)
    )
    for _ in range(FUZZED_HTTP):
        say(server.http_port, http_garbage(rng, head + voxels, len(head)))
    assert server.process.poll() is None
    assert_answers(server, embedded)


def test_garbage_on_the_grpc_port(server: BreakableServer, embedded: Runtime) -> None:
    rng = random.Random(FUZZ_SEED)
    for _ in range(FUZZED_GRPC):
        say(server.grpc_port, grpc_garbage(rng))
    assert server.process.poll() is None
    assert_answers(server, embedded)


def test_damaged_messages_on_the_grpc_port(server: BreakableServer, embedded: Runtime) -> None:
    import grpc as plain_grpc

    with plain_grpc.insecure_channel(server.url) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for message in damaged_messages(random.Random(FUZZ_SEED), FUZZED_GRPC):
            with suppress(plain_grpc.RpcError):
                infer(message, timeout=WAIT_S)
    assert server.process.poll() is None
    assert_answers(server, embedded)


def test_oversized_messages_on_the_grpc_port(server: BreakableServer, embedded: Runtime) -> None:
    import grpc as plain_grpc

    said = bytes(OVERSIZED)
    with plain_grpc.insecure_channel(server.url, [("grpc.max_send_message_length", -1)]) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for _ in range(OVERSIZED_TIMES):
            with pytest.raises(plain_grpc.RpcError):
                infer(said, timeout=WAIT_S)
    assert server.process.poll() is None
    assert_answers(server, embedded)


@pytest.fixture(scope="module")
def watched_server(random_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """As a user starts it: the launcher watches it."""
    with running_server(random_repository, folder=tmp_path_factory.mktemp("watched")) as server:
        yield server


def regions_of(server: RunningServer) -> list[Path]:
    """Of the memory that Triton shares with its model, as the server's options name them."""
    (child,) = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    (name,) = re.findall(rf"{REGION_PREFIX}\w+", Path(f"/proc/{child}/cmdline").read_text())
    return list(SHARED_MEMORY.glob(f"{name}*"))


def ask_by_grpc(server: RunningServer) -> None:
    import grpc as plain_grpc

    with plain_grpc.insecure_channel(server.url) as channel, pytest.raises(plain_grpc.RpcError):
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(deadly_message(), timeout=WAIT_S)


def ask_by_http(server: RunningServer) -> None:
    url = f"{server.http_url}/v2/models/anatomynet/infer"
    with pytest.raises((urllib.error.HTTPError, ConnectionError)) as caught:
        urllib.request.urlopen(url, deadly_body(), timeout=WAIT_S)
    if isinstance(caught.value, urllib.error.HTTPError):
        caught.value.close()


@pytest.mark.parametrize("ask", [ask_by_grpc, ask_by_http])
def test_a_request_that_ends_the_model_costs_a_restart(
    watched_server: RunningServer, embedded: Runtime, ask: Callable[[RunningServer], None]
) -> None:
    """Of shapes that numpy refuses; and nothing of the server that was stays in shared memory."""
    hu, told, before = smooth_hu(SHAPE), watched_server.log.read_text().count(ANEW), regions_of(watched_server)
    assert before
    ask(watched_server)
    wait_until(lambda: watched_server.log.read_text().count(ANEW) == told + 1, "the server started anew")
    with TritonRuntime(watched_server.url, wait_s=WAIT_S) as runtime:
        np.testing.assert_array_equal(runtime.infer(hu)[0], embedded.infer(hu)[0])
    assert watched_server.process.poll() is None
    assert not any(path.exists() for path in before)
    assert regions_of(watched_server)


@pytest.mark.parametrize("called", ["application/octet-stream", "application/x-www-form-urlencoded"])
def test_oversized_bodies_on_the_http_port(server: BreakableServer, embedded: Runtime, called: str) -> None:
    """The second is what curl and urllib call a body, and what ended the server where its stacks were small."""
    tensor = {"name": "CT", "datatype": "INT16", "shape": SHAPE, "parameters": {"binary_data_size": OVERSIZED}}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": called}
    url = f"http://127.0.0.1:{server.http_port}/v2/models/anatomynet/infer"
    request = urllib.request.Request(url, head + bytes(OVERSIZED), headers)
    for _ in range(OVERSIZED_TIMES):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=WAIT_S)
        with caught.value as answer:
            assert answer.code == 400
    assert server.process.poll() is None
    assert_answers(server, embedded)
