"""client/triton.py and the served model, against a real tritonserver; each server is started by the launcher."""

import dataclasses
import json
import queue
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from google.protobuf import json_format, text_format
from numpy.typing import NDArray

from anatomynet.client import channel, pipeline
from anatomynet.client.connection import ServerOptions
from anatomynet.client.ct_writer import write_ct_series
from anatomynet.client.failures import Outlook, outlook_of, reason_of
from anatomynet.client.shared_memory import REGION_PREFIX, SHARED_MEMORY_FOLDER
from anatomynet.client.triton import TritonRuntime, probe_local
from anatomynet.client.triton_server import TritonServer
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import GeometryError, ModelError, ServerError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.machine import MemoryGuard
from anatomynet.engine.region import RegionConfig
from anatomynet.engine.runtime import Runtime, load_runtime
from anatomynet.engine.volume import CTVolume
from anatomynet.export.triton_models import LARGEST_QUEUE
from tests.random_network import smooth_hu
from tests.shared_regions import assert_none_is_left, registered_regions
from tests.triton_servers import RunningServer, ServerStarter, free_ports
from tests.waiting import WAIT_TIMEOUT_S, wait_until
from tests.wire import recorded

grpc = pytest.importorskip("tritonclient.grpc")
utils = pytest.importorskip("tritonclient.utils")

# One of odd sides, one that is as small as can be, one of a common form.
SHAPES = ((9, 47, 131), (8, 32, 32), (24, 96, 128))
Way = Literal["auto", "on", "off"]
CT_TENSOR = {"name": "CT", "dataType": "TYPE_INT16", "dims": [-1, -1, -1]}
WAYS: tuple[Way, ...] = ("on", "off")
RESTRICTED = "--grpc-restricted-protocol=shared-memory:key=secret"


def called(url: str, hu: NDArray[Any], datatype: str = "INT16") -> Any:
    """What a client that knows only the contract gets."""
    ct = grpc.InferInput("CT", hu.shape, datatype)
    ct.set_data_from_numpy(hu)
    with grpc.InferenceServerClient(url) as client:
        return client.infer("anatomynet", [ct])


def answer_of(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def embedded(random_onnx_files: tuple[Path, Path]) -> Runtime:
    """The same network in this process, from the FP32 file: what a server on a CPU must take."""
    return load_runtime(random_onnx_files[0])


@pytest.fixture(scope="module")
def closed_server(start_server: ServerStarter, random_repository: Path) -> Iterator[RunningServer]:
    """No model loaded, and shared memory for those who know the key."""
    with start_server(random_repository, "--model-control-mode=explicit", RESTRICTED) as server:
        yield server


# --- the contract, for a client in any language


def test_metadata_over_plain_http(triton_server: RunningServer, random_model_config: ModelConfig) -> None:
    metadata = answer_of(f"{triton_server.http_url}/v2/models/anatomynet")
    assert metadata["inputs"] == [{"name": "CT", "datatype": "INT16", "shape": [-1, -1, -1]}]
    assert metadata["outputs"] == [
        {"name": "LABEL_MAP", "datatype": "UINT8", "shape": [-1, -1, -1]},
        {"name": "CONFIDENCE", "datatype": "FP32", "shape": [len(random_model_config.structures)]},
    ]


def test_parameters_over_plain_http(triton_server: RunningServer, random_model_config: ModelConfig) -> None:
    parameters = answer_of(f"{triton_server.http_url}/v2/models/anatomynet/config")["parameters"]
    assert parameters["structures"]["string_value"].split(",") == list(random_model_config.structures)
    assert parameters["checkpoint_sha256"]["string_value"] == random_model_config.checkpoint_sha256
    assert json.loads(parameters["model_config"]["string_value"])["in_plane_stride"] == 4


def test_inference_over_plain_http(triton_server: RunningServer, embedded: Runtime) -> None:
    hu = smooth_hu(SHAPES[1])
    ct = {"name": "CT", "datatype": "INT16", "shape": hu.shape, "data": hu.ravel().tolist()}
    request = urllib.request.Request(
        f"{triton_server.http_url}/v2/models/anatomynet/infer", json.dumps({"inputs": [ct]}).encode()
    )
    with urllib.request.urlopen(request) as answer:
        outputs = {output["name"]: output for output in json.load(answer)["outputs"]}
    assert outputs["LABEL_MAP"]["shape"] == list(hu.shape)
    assert outputs["LABEL_MAP"]["data"] == embedded.infer(hu)[0].ravel().tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_any_size(triton_server: RunningServer, embedded: Runtime, shape: tuple[int, int, int]) -> None:
    hu = smooth_hu(shape)
    result = called(triton_server.url, hu)
    label_map, confidence = embedded.infer(hu)
    assert len(np.unique(label_map)) > 2
    assert result.as_numpy("LABEL_MAP").dtype == np.uint8
    np.testing.assert_array_equal(result.as_numpy("LABEL_MAP"), label_map)
    np.testing.assert_array_equal(result.as_numpy("CONFIDENCE"), confidence)


@pytest.mark.parametrize(
    ("hu", "datatype", "message"),
    [
        (np.zeros((64, 64), np.int16), "INT16", "shape"),
        (np.zeros((16, 64, 64), np.float32), "FP32", "data-type"),
        (np.zeros((4, 64, 64), np.int16), "INT16", r"at least \(8, 32, 32\)"),
        (np.zeros((0, 64, 64), np.int16), "INT16", r"at least \(8, 32, 32\)"),
    ],
    ids=["2-D", "FP32", "too small", "empty"],
)
def test_survives_bad_requests(
    triton_server: RunningServer, embedded: Runtime, hu: NDArray[Any], datatype: str, message: str
) -> None:
    with pytest.raises(utils.InferenceServerException, match=message) as caught:
        called(triton_server.url, hu, datatype)
    assert "\n" not in caught.value.message()
    good = smooth_hu(SHAPES[1])
    np.testing.assert_array_equal(called(triton_server.url, good).as_numpy("LABEL_MAP"), embedded.infer(good)[0])


def test_a_full_queue_refuses_at_once_and_loses_nothing(triton_server: RunningServer) -> None:
    ct = grpc.InferInput("CT", SHAPES[1], "INT16")
    ct.set_data_from_numpy(smooth_hu(SHAPES[1]))
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with grpc.InferenceServerClient(triton_server.url) as client:
        with triton_server.holding():
            for _ in range(LARGEST_QUEUE + 4):
                client.async_infer("anatomynet", [ct], lambda result, error: outcomes.put(error))
            errors = [outcomes.get(timeout=60)]
        errors += [outcomes.get(timeout=60) for _ in range(LARGEST_QUEUE + 3)]
    assert errors[0] is not None
    assert "maximum queue size" in errors[0].message()
    assert sum(error is None for error in errors) >= LARGEST_QUEUE


# --- TritonRuntime


@pytest.mark.parametrize("shape", SHAPES)
def test_same_result_by_every_way(triton_server: RunningServer, embedded: Runtime, shape: tuple[int, int, int]) -> None:
    hu = smooth_hu(shape)
    expected = embedded.infer(hu)
    ways: tuple[Way, ...] = ("auto", *WAYS)
    for way in ways:
        with TritonRuntime(triton_server.url, shared_memory=way) as runtime:
            label_map, confidence = runtime.infer(hu)
            assert f"by {'gRPC' if way == 'off' else 'shared memory'}" in runtime.description
        np.testing.assert_array_equal(label_map, expected[0])
        np.testing.assert_array_equal(confidence, expected[1])
    assert_none_is_left()
    assert registered_regions(triton_server.url) == set()


def test_a_server_that_is_slow_to_connect_is_there(
    triton_server: RunningServer, random_model_config: ModelConfig
) -> None:
    """At the end of a long line, or on a busy machine."""
    pauses = iter([0.6])
    with (
        recorded(triton_server.grpc_port, watch=lambda: time.sleep(next(pauses, 0))) as (port, _),
        TritonRuntime(f"127.0.0.1:{port}") as runtime,
    ):
        assert runtime.model == random_model_config


class ServerOfAModel(TritonServer):
    """Serves `model` without being there, and answers with `meanwhile` in the middle."""

    model: ModelConfig
    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    def connect(self) -> ModelConfig:
        self.version = "2"
        return self.model

    def ask_model(self) -> ModelConfig:
        return self.model

    def infer(self, hu: NDArray[np.int16], *, structures: int, timeout_s: float) -> Any:
        meanwhile, type(self).meanwhile = self.meanwhile, staticmethod(lambda: None)
        meanwhile()
        return hu.astype(np.uint8), np.zeros(structures, np.float32)


@pytest.fixture
def served(random_model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> type[ServerOfAModel]:
    monkeypatch.setattr("anatomynet.client.triton.TritonServer", ServerOfAModel)
    monkeypatch.setattr("anatomynet.client.triton.common_region_finder", lambda clients, *, timeout_s: None)
    monkeypatch.setattr(ServerOfAModel, "model", random_model_config, raising=False)
    return ServerOfAModel


def test_another_model_is_told_to_each_that_asked_the_one_before(
    served: type[ServerOfAModel], random_model_config: ModelConfig
) -> None:
    """Of two threads that were on their way one has found it before the other asks."""
    hu, another = smooth_hu(SHAPES[1]), dataclasses.replace(random_model_config, checkpoint_sha256="0ddba11" * 9 + "0")
    with TritonRuntime("127.0.0.1:1") as runtime:

        def found_by_another_thread() -> None:
            served.model = another
            with pytest.raises(ServerError, match=r"5eed.* to 0ddba11"):
                runtime.infer(hu)
            assert runtime.model == another

        served.meanwhile = staticmethod(found_by_another_thread)
        with pytest.raises(ServerError, match=r"5eed.* to 0ddba11"):
            runtime.infer(hu)
        runtime.infer(hu)


@pytest.mark.parametrize("change", [{"name": "another"}, {"patients": (0, *[9] * 6)}], ids=["name", "patients"])
def test_a_model_for_which_what_was_settled_does_not_hold_is_not_gone_on_with(
    served: type[ServerOfAModel], random_model_config: ModelConfig, change: dict[str, Any]
) -> None:
    with TritonRuntime("127.0.0.1:1") as runtime:
        served.model = dataclasses.replace(random_model_config, checkpoint_sha256="0ddba11" * 9 + "0", **change)
        for _ in range(2):
            with pytest.raises(ServerError, match="has changed"):
                runtime.infer(smooth_hu(SHAPES[1]))
        assert runtime.model == random_model_config


def test_reads_the_model_config(triton_server: RunningServer, random_model_config: ModelConfig) -> None:
    with TritonRuntime(triton_server.url) as runtime:
        assert runtime.model == random_model_config
        assert runtime.description.startswith("Triton 2.")
        assert triton_server.url in runtime.description


WRONG = {
    "int32": np.full((8, 32, 32), 70_000, np.int32),  # a copy to int16 would make 4464 HU of it
    "uint16": np.zeros((8, 32, 32), np.uint16),
    "float": np.zeros((8, 32, 32), np.float32),
    "big-endian": np.zeros((8, 32, 32), ">i2"),
    "2-D": np.zeros((32, 32), np.int16),
    "4-D": np.zeros((1, 8, 32, 32), np.int16),
    "empty": np.zeros((0, 32, 32), np.int16),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hu", WRONG.values(), ids=WRONG)
def test_another_array_is_refused_as_by_every_runtime(
    triton_server: RunningServer, embedded: Runtime, hu: NDArray[Any], way: Way
) -> None:
    with pytest.raises(GeometryError) as expected:
        embedded.infer(hu)
    with TritonRuntime(triton_server.url, shared_memory=way) as runtime, pytest.raises(GeometryError) as caught:
        runtime.infer(hu)
    assert str(caught.value) == str(expected.value)


def test_a_view_is_sent_as_it_looks(triton_server: RunningServer, embedded: Runtime) -> None:
    hu = smooth_hu(SHAPES[2])[::-1, :, ::2]
    for way in WAYS:
        with TritonRuntime(triton_server.url, shared_memory=way) as runtime:
            np.testing.assert_array_equal(runtime.infer(hu)[0], embedded.infer(np.ascontiguousarray(hu))[0])


def test_several_threads_share_a_runtime(triton_server: RunningServer, embedded: Runtime) -> None:
    volumes = [np.roll(smooth_hu(SHAPES[1]), k, axis=2) for k in range(4)]
    with TritonRuntime(triton_server.url) as runtime, ThreadPoolExecutor(len(volumes)) as pool:
        answers = list(pool.map(runtime.infer, volumes))
    for hu, (labels, _) in zip(volumes, answers, strict=True):
        np.testing.assert_array_equal(labels, embedded.infer(hu)[0])


def test_a_servers_refusal_is_one_line(triton_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses what this client would not have sent, too."""
    monkeypatch.setattr("anatomynet.client.triton.check_input", lambda hu, model: None)
    for way in WAYS:
        with TritonRuntime(triton_server.url, shared_memory=way) as runtime:
            with pytest.raises(ServerError, match=r"at least \(8, 32, 32\)") as caught:
                runtime.infer(smooth_hu((4, 64, 64)))
            assert "\n" not in str(caught.value)
    assert registered_regions(triton_server.url) == set()


@pytest.mark.parametrize("way", WAYS)
def test_timeout_cancels_and_the_next_is_answered(triton_server: RunningServer, embedded: Runtime, way: Way) -> None:
    hu = smooth_hu(SHAPES[1])
    with (
        triton_server.holding(),
        TritonRuntime(triton_server.url, shared_memory=way, timeout_s=2) as hasty,
        pytest.raises(ServerError, match=r"no answer .* within [0-2](\.\d)? s"),
    ):
        hasty.infer(hu)
    assert_none_is_left()
    with TritonRuntime(triton_server.url, shared_memory=way) as runtime:
        np.testing.assert_array_equal(runtime.infer(hu)[0], embedded.infer(hu)[0])


# Whoever starts the tests in the background has SIGINT ignored, and children inherit that.
KILLED_CLIENT = f"""
import signal, sys, numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)
from anatomynet.client.triton import TritonRuntime
runtime = TritonRuntime(sys.argv[1], shared_memory="on")
runtime.infer(np.zeros({SHAPES[1]}, np.int16))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_client_leaves_no_shared_memory(triton_server: RunningServer, sent: signal.Signals) -> None:
    command = [sys.executable, "-c", KILLED_CLIENT, triton_server.url]
    with triton_server.holding() as is_computing, subprocess.Popen(command, stderr=subprocess.DEVNULL) as client:
        wait_until(is_computing, "its volume is computed")
        client.send_signal(sent)
        assert client.wait(timeout=30) != 0
    assert_none_is_left()


def test_what_killed_clients_left_registered_is_freed(triton_server: RunningServer) -> None:
    names = {expiry: f"{REGION_PREFIX}{expiry}-test" for expiry in (int(time.time()) - 1, int(time.time()) + 3600)}
    with grpc.InferenceServerClient(triton_server.url) as client:
        for name in (*names.values(), "someone-elses"):
            path = SHARED_MEMORY_FOLDER / name
            path.write_bytes(b"0" * 64)
            client.register_system_shared_memory(name, f"/{name}", 64)
            path.unlink()
        TritonRuntime(triton_server.url).close()
        left = registered_regions(triton_server.url)
        for name in (names[max(names)], "someone-elses"):
            client.unregister_system_shared_memory(name)
    assert names[min(names)] not in left
    assert {names[max(names)], "someone-elses"} <= left


def test_too_little_shared_memory_falls_back_to_grpc(triton_server: RunningServer, embedded: Runtime) -> None:
    hu = smooth_hu(SHAPES[2])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with TritonRuntime(triton_server.url) as runtime:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hu.nbytes, limits[1]))  # the region wants half as much again
        try:
            label_map, _ = runtime.infer(hu)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "by gRPC" in runtime.description
    np.testing.assert_array_equal(label_map, embedded.infer(hu)[0])
    assert_none_is_left()


def test_refused_shared_memory_falls_back_to_grpc(closed_server: RunningServer, embedded: Runtime) -> None:
    hu = smooth_hu(SHAPES[1])
    with grpc.InferenceServerClient(closed_server.url) as client:
        client.load_model("anatomynet")
        with TritonRuntime(closed_server.url) as runtime:
            np.testing.assert_array_equal(runtime.infer(hu)[0], embedded.infer(hu)[0])
            assert "by gRPC" in runtime.description
        with TritonRuntime(closed_server.url, shared_memory="on") as runtime, pytest.raises(ServerError, match="share"):
            runtime.infer(hu)
        client.unload_model("anatomynet")
    assert_none_is_left()


# --- what is not there


def test_no_server() -> None:
    (port,) = free_ports(1)
    with pytest.raises(ServerError, match=rf"no Triton server at localhost:{port} .*refused.*tritonserver --model"):
        TritonRuntime(f"localhost:{port}")


@contextmanager
def swallowing() -> Iterator[str]:
    """An address at which whoever connects hears nothing: the queue of a socket that accepts nobody is full."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):  # more than it takes
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listening.getsockname())
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_an_address_that_swallows_packets_is_told_after_four_seconds() -> None:
    start = time.monotonic()
    with swallowing() as url, pytest.raises(ServerError, match=rf"no Triton server at {url} .*nobody answers there"):
        TritonRuntime(url)
    assert round(time.monotonic() - start, 1) >= channel.HANDSHAKE_MS / 1000 == 4


def test_an_address_that_swallows_packets_is_asked_again_until_the_wait_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "HANDSHAKE_MS", 500)
    told: list[str] = []
    with swallowing() as url, pytest.raises(ServerError, match="nobody answers there"):
        TritonRuntime(url, wait_s=3.0, tell=told.append)
    assert told
    assert all("nobody answers there" in line and "trying again" in line for line in told)


def test_of_two_addresses_one_swallows_packets(triton_server: RunningServer, embedded: Runtime) -> None:
    told: list[str] = []
    hu = smooth_hu(SHAPES[1])
    with swallowing() as url, TritonRuntime(url, triton_server.url, tell=told.append) as runtime:
        np.testing.assert_array_equal(runtime.infer(hu)[0], embedded.infer(hu)[0])
    assert [line for line in told if line.startswith(url) and "going on without it" in line]


@pytest.mark.parametrize("said", ["connect() timed out", "UNKNOWN: ipv4:192.0.2.1:8001: tcp handshaker shutdown"])
def test_both_of_grpcs_words_for_it_say_what_to_do(said: str) -> None:
    words = f"failed to connect to all addresses; last error: {said}"
    error = utils.InferenceServerException(msg=words, status="StatusCode.UNAVAILABLE")
    assert "nobody answers there" in reason_of(error)
    assert outlook_of(error) is Outlook.LATER


def test_a_port_that_does_not_speak_grpc(triton_server: RunningServer) -> None:
    with pytest.raises(ServerError, match=r"no Triton server at .*gRPC"):
        TritonRuntime(f"127.0.0.1:{triton_server.http_port}")


@pytest.mark.parametrize(
    "url", ["http://localhost:8000", "localhost:port", "localhost/v2", ":8001", "", " ", "a b:8001", "[::1"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ServerError, match="is no address of a server: expected HOST:PORT"):
        TritonRuntime(url)


def test_model_not_ready(closed_server: RunningServer) -> None:
    with pytest.raises(ServerError, match="no READY model anatomynet"):
        TritonRuntime(closed_server.url)
    assert probe_local(closed_server.url) is None


def config_of(repository: Path) -> dict[str, Any]:
    text = (repository / "anatomynet" / "config.pbtxt").read_text()
    config: dict[str, Any] = json_format.MessageToDict(text_format.Parse(text, grpc.model_config_pb2.ModelConfig()))
    return config


@contextmanager
def loaded_with(
    server: RunningServer, config: dict[str, Any], *, files: dict[str, bytes] | None = None
) -> Iterator[None]:
    with grpc.InferenceServerClient(server.url) as client:
        client.load_model("anatomynet", config=json.dumps(config), files=files)
        try:
            yield
        finally:
            client.unload_model("anatomynet")


FOREIGN_MODEL = b"class TritonPythonModel:\n    def execute(self, requests):\n        return [None for _ in requests]\n"


def test_model_that_is_not_ours(closed_server: RunningServer) -> None:
    config = {"backend": "python", "input": [CT_TENSOR], "output": [CT_TENSOR | {"name": "LABEL_MAP"}]}
    with (
        loaded_with(closed_server, config, files={"file:1/model.py": FOREIGN_MODEL}),
        pytest.raises(ServerError, match="anatomynet-export"),
    ):
        TritonRuntime(closed_server.url)


def test_size_limit(closed_server: RunningServer, random_repository: Path) -> None:
    """The client keeps to what the served model says of itself; from others the server refuses it."""
    config = config_of(random_repository)
    depth, height, width = map(int, config["modelWarmup"][0]["inputs"]["CT"]["dims"])
    config["parameters"]["largest_voxels"] = {"stringValue": str(depth * height * width)}
    too_large = np.zeros((depth + 1, height, width), np.int16)
    with loaded_with(closed_server, config), TritonRuntime(closed_server.url) as runtime:
        with pytest.raises(GeometryError, match=r"at most \d+ in all"):
            runtime.infer(too_large)
        with pytest.raises(utils.InferenceServerException, match=r"at most \d+ in all"):
            called(closed_server.url, too_large)
        runtime.infer(smooth_hu(SHAPES[0]))


def test_study_that_is_too_large_is_refused_before_a_voxel_is_read(
    closed_server: RunningServer, random_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = CTVolume(np.zeros((16, 64, 64), np.int16), VolumeGeometry((16, 64, 64), (1.0, 1.0, 2.5)))
    write_ct_series(tmp_path / "study", volume)
    monkeypatch.setattr(pipeline, "volume_from_series", lambda series: pytest.fail("its voxels were read"))
    config = config_of(random_repository)
    del config["modelWarmup"]  # larger than that; Triton 2.51 dies of a warm-up that is refused
    config["parameters"]["largest_voxels"] = {"stringValue": str(15 * 64 * 64)}
    options = pipeline.SegmentOptions(server=ServerOptions(urls=(closed_server.url,)), output=tmp_path / "rs.dcm")
    with (
        loaded_with(closed_server, config),
        pytest.raises(GeometryError, match=r"CT of \(16, 64, 64\) voxels .* at most 61440 in all"),
    ):
        pipeline.segment_study(tmp_path / "study", options)
    assert not (tmp_path / "rs.dcm").exists()


def test_one_slice_and_two_thousand(triton_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused in one line before they are sent, and the server goes on."""
    with TritonRuntime(triton_server.url) as runtime:
        with monkeypatch.context() as without:
            without.delattr(TritonServer, "infer")
            with pytest.raises(GeometryError, match="1022 slices of 512 x 512") as large:
                runtime.infer(np.zeros((2000, 512, 512), np.int16))
            with pytest.raises(GeometryError, match=r"at least \(8, 32, 32\) voxels") as small:
                runtime.infer(np.zeros((1, 512, 512), np.int16))
        assert all("\n" not in str(caught.value) for caught in (large, small))
        assert runtime.infer(smooth_hu(SHAPES[0]))[0].shape == SHAPES[0]


def test_another_server_may_have_the_memory() -> None:
    with pytest.raises(ModelError) as caught:
        MemoryGuard(1e12).check((1000, 1000, 1000))
    refusal = utils.InferenceServerException(msg=str(caught.value), status="StatusCode.INVALID_ARGUMENT")
    assert outlook_of(refusal) is Outlook.ELSEWHERE


def test_configuration_of_another_checkpoint_is_not_served(
    closed_server: RunningServer, random_repository: Path
) -> None:
    config = config_of(random_repository)
    mixed_up = json.loads(config["parameters"]["model_config"]["stringValue"]) | {"checkpoint_sha256": "0" * 64}
    config["parameters"]["model_config"] = {"stringValue": json.dumps(mixed_up)}
    with (
        pytest.raises(utils.InferenceServerException, match="of two models"),
        loaded_with(closed_server, config),
    ):
        pass


def test_probe_finds_a_ready_model_past_a_proxy(
    triton_server: RunningServer, monkeypatch: pytest.MonkeyPatch, random_model_config: ModelConfig
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setattr("anatomynet.client.triton.PROBE_TIMEOUT_S", WAIT_TIMEOUT_S)
    runtime = probe_local(triton_server.url)
    assert runtime is not None
    with runtime:
        assert runtime.model == random_model_config


def test_probe_finds_nothing() -> None:
    assert probe_local(f"localhost:{free_ports(1)[0]}") is None


@pytest.mark.parametrize("of_its_region", [False, True])
@pytest.mark.parametrize("change", [{"from_a_newer_version": 1}, {"name": "../elsewhere"}, None], ids=str)
def test_a_server_of_a_model_that_this_client_does_not_know(
    random_model_config: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object] | None,
    of_its_region: bool,
) -> None:
    """Asked for, it is a server that cannot be used; on this machine it is passed over."""
    region = RegionConfig(("Mandible",), (6.0, 6.0, 6.0), (-1000.0, 600.0), 0.0, (1, 1, 1))
    known = {"anatomynet": random_model_config.to_json(), "anatomynet_region": region.to_json()}
    changed = list(known)[of_its_region]
    known[changed] = "" if change is None else json.dumps(json.loads(known[changed]) | change)

    def get_model_config(_: object, name: str, **__: object) -> Any:
        key = "region_config" if name == "anatomynet_region" else "model_config"
        return SimpleNamespace(config=SimpleNamespace(parameters={key: SimpleNamespace(string_value=known[name])}))

    for name, answer in {
        "get_server_metadata": lambda *_, **__: SimpleNamespace(version="2.99.0"),
        "is_model_ready": lambda *_, **__: True,
        "get_model_config": get_model_config,
    }.items():
        monkeypatch.setattr(grpc.InferenceServerClient, name, answer)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ServerError, match=f"the model {changed} .*: update this client"):
            TritonRuntime(url, shared_memory="off", retries=False)
        monkeypatch.setattr("anatomynet.client.triton_server.SHARED_MEMORY_FOLDER", Path(url))
        assert probe_local(url) is None


def test_a_limit_of_the_served_model_that_is_no_number(
    random_model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = {"model_config": random_model_config.to_json(), "largest_voxels": "many"}
    config = SimpleNamespace(parameters={key: SimpleNamespace(string_value=text) for key, text in parameters.items()})
    monkeypatch.setattr(grpc.InferenceServerClient, "get_model_config", lambda *_, **__: SimpleNamespace(config=config))
    with pytest.raises(ServerError, match="no whole number"):
        TritonServer("127.0.0.1:1", shared_memory="off", answer_timeout_s=1.0).ask_model()


def test_probe_does_not_wait_for_another_service() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert probe_local(f"127.0.0.1:{silent.getsockname()[1]}") is None


def test_importing_is_light() -> None:
    loaded = "import sys, anatomynet.client.triton; print({'tritonclient', 'grpc', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
