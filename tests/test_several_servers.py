"""Two real servers as one: behind the nginx that ships, and by gRPC's own round robin. They share, and one may die."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.config import shipped_weights
from anatomynet.engine.region_runtime import EmbeddedRegionFinder, shipped_region
from anatomynet.engine.runtime import Runtime, load_runtime
from anatomynet.export.repository import write_repository
from anatomynet.export.triton_models import python_model, region_model
from tests.breakable_server import BreakableServer, two_servers
from tests.random_network import smooth_hu
from tests.tls_proxy import Certificates, make_certificates, running_proxy
from tests.triton_servers import RunningServer, ServerStarter, answered_since, has_server, volumes_answered
from tests.waiting import wait_until
from tests.wire import Recording, recorded

grpc = pytest.importorskip("tritonclient.grpc")
pytestmark = pytest.mark.skipif(not has_server(), reason="no tritonserver here: pip install 'anatomynet[serve]'")

SHAPE = (24, 96, 128)
VOLUMES = 8
CLIENTS = 4
# Odd: were all volumes of a client to go to one server, the clients would not make up for one another.
CLIENTS_AT_ONCE = 3
# How much later one server is told each thing than the other, and how many clients send a volume each: that one server
# gets none, where each takes either, happens once in 30,000 runs.
FAR_S = 0.02
CLIENTS_OF_ONE_VOLUME = 16
READING_S = 10.0
# gRPC begins with the first server that it has reached.
UNEVEN = 1


@pytest.fixture(scope="module")
def embedded(random_onnx_files: tuple[Path, Path]) -> Runtime:
    return load_runtime(random_onnx_files[0])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def _servers(random_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[BreakableServer]]:
    with two_servers(random_repository, tmp_path_factory.mktemp("servers")) as servers:
        yield servers


@pytest.fixture
def servers(_servers: list[BreakableServer]) -> list[BreakableServer]:
    """Both READY."""
    for server in _servers:
        server.ensure_running()
    return _servers


Opener = Callable[..., TritonRuntime]


@pytest.fixture(params=["nginx", "round robin"])
def opener(
    request: pytest.FixtureRequest, servers: list[BreakableServer], certificates: Certificates, tmp_path: Path
) -> Iterator[Opener]:
    """Makes a client that knows one address for both."""
    with addressed(request.param, servers, certificates, tmp_path) as opener:
        yield opener


def urls_of(servers: Sequence[BreakableServer | RunningServer]) -> list[str]:
    return [server.url for server in servers]


@contextmanager
def addressed(
    way: str, servers: Sequence[BreakableServer | RunningServer], certificates: Certificates, folder: Path
) -> Iterator[Opener]:
    urls = urls_of(servers)
    if way == "round robin":
        yield lambda **options: TritonRuntime(f"ipv4:{','.join(urls)}", **options)
        return
    with running_proxy(folder, certificates, urls) as proxy:
        yield lambda **options: TritonRuntime(proxy.url, access=certificates.access(), **options)


def test_one_connection_brings_work_to_both(opener: Opener, servers: list[BreakableServer]) -> None:
    """Each request goes to the next server, although the client has one connection, and asks more than it draws."""
    before = volumes_answered(*urls_of(servers))
    with opener() as runtime:
        for _ in range(VOLUMES):
            runtime.infer(smooth_hu(SHAPE))
    shares = answered_since(before, *urls_of(servers), volumes=VOLUMES)
    assert sum(shares) == VOLUMES
    assert max(shares) - min(shares) <= 2 * UNEVEN


def test_clients_at_once_bring_work_to_both(opener: Opener, servers: list[BreakableServer]) -> None:
    """Each of them evenly; at which server one begins is chance."""
    before = volumes_answered(*urls_of(servers))

    def draw(_: int) -> None:
        with opener() as runtime:
            for _ in range(VOLUMES):
                runtime.infer(smooth_hu(SHAPE))

    with ThreadPoolExecutor(CLIENTS_AT_ONCE) as threads:
        list(threads.map(draw, range(CLIENTS_AT_ONCE)))
    shares = answered_since(before, *urls_of(servers), volumes=CLIENTS_AT_ONCE * VOLUMES)
    assert sum(shares) == CLIENTS_AT_ONCE * VOLUMES
    assert max(shares) - min(shares) <= CLIENTS_AT_ONCE * 2 * UNEVEN < VOLUMES


def test_clients_of_one_volume_do_not_all_bring_it_to_the_nearest_server(servers: list[BreakableServer]) -> None:
    """As `segment` is one: between the server's first answer and its volume it reads the study."""
    near, far = servers
    before = volumes_answered(*urls_of(servers))
    with recorded(far.grpc_port, watch=partial(time.sleep, FAR_S)) as (port, wire), ExitStack() as open_clients:
        urls = f"ipv4:{near.url},127.0.0.1:{port}"
        runtimes = [open_clients.enter_context(TritonRuntime(urls)) for _ in range(CLIENTS_OF_ONE_VOLUME)]
        studies_are_read(wire)
        for runtime in runtimes:
            runtime.infer(smooth_hu(SHAPE))
    shares = answered_since(before, *urls_of(servers), volumes=CLIENTS_OF_ONE_VOLUME)
    assert sum(shares) == CLIENTS_OF_ONE_VOLUME
    assert min(shares) >= 1


def studies_are_read(wire: Recording) -> None:
    """While that goes on, the far server too answers on a client's two connections; or it is not asked."""
    deadline = time.monotonic() + READING_S
    while time.monotonic() < deadline and sum(map(bool, wire.answered)) < 2 * CLIENTS_OF_ONE_VOLUME:
        time.sleep(0.05)


def test_one_is_killed_and_nothing_is_lost(opener: Opener, servers: list[BreakableServer], embedded: Runtime) -> None:
    volumes = [smooth_hu(SHAPE, seed=seed) for seed in range(VOLUMES)]
    told: list[str] = []
    with opener(tell=told.append) as runtime, ThreadPoolExecutor(CLIENTS) as threads:
        with servers[0].holding() as is_computing:
            answers = [threads.submit(runtime.infer, hu) for hu in volumes]
            wait_until(is_computing, "a volume has come to the one")
            servers[0].kill()
        for hu, answer in zip(volumes, answers, strict=True):
            np.testing.assert_array_equal(answer.result(timeout=60)[0], embedded.infer(hu)[0])
    assert any("trying again" in line for line in told)


def test_one_whose_model_has_died_is_gone_round(
    opener: Opener, servers: list[BreakableServer], embedded: Runtime
) -> None:
    """It says READY and refuses every volume at once: nobody but the client finds out."""
    hu = smooth_hu(SHAPE)
    with opener() as runtime:
        servers[0].kill_model()
        answers = [runtime.infer(hu)[0] for _ in range(3)]
    servers[0].kill()
    for label_map in answers:
        np.testing.assert_array_equal(label_map, embedded.infer(hu)[0])


@pytest.fixture(scope="module")
def finding_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped network and its region finder."""
    repository = tmp_path_factory.mktemp("finding") / "repo"
    onnx_file, region_file = shipped_weights(".onnx"), shipped_region(".onnx")
    region = region_model(EmbeddedRegionFinder(region_file).config, region_file, backend="python")
    write_repository(repository, [python_model(load_runtime(onnx_file).model, [onnx_file]), region])
    return repository


@pytest.fixture(scope="module")
def finding_servers(
    start_server: ServerStarter, finding_repository: Path
) -> Iterator[tuple[RunningServer, RunningServer]]:
    """Two with a region finder."""
    with start_server(finding_repository) as first, start_server(finding_repository) as second:
        yield first, second


def test_a_server_whose_models_are_not_ready_takes_the_region_finder_from_none(
    finding_servers: tuple[RunningServer, RunningServer], start_server: ServerStarter, finding_repository: Path
) -> None:
    with (
        start_server(finding_repository, "--model-control-mode=explicit") as loading,
        TritonRuntime(finding_servers[0].url, loading.url) as runtime,
    ):
        assert runtime.region_finder is not None


@pytest.mark.parametrize("way", ["nginx", "round robin"])
def test_a_region_finder_before_each_volume_does_not_bring_all_to_one(
    way: str, finding_servers: tuple[RunningServer, RunningServer], certificates: Certificates, tmp_path: Path
) -> None:
    """Box, volume, box, volume: in one round of two servers, all boxes would go to one and all volumes to the other."""
    first, second = finding_servers
    hu = smooth_hu(SHAPE)
    with addressed(way, finding_servers, certificates, tmp_path) as opener, opener() as runtime:
        assert runtime.region_finder is not None
        before = volumes_answered(first.url, second.url)
        for _ in range(VOLUMES):
            runtime.region_finder.find(hu)
            runtime.infer(hu)
        shares = answered_since(before, first.url, second.url, volumes=VOLUMES)
    assert sum(shares) == VOLUMES
    assert max(shares) - min(shares) <= 2 * UNEVEN
