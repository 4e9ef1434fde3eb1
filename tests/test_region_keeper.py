"""A region whose volume was answered is kept for the next one, for a few seconds, and leaves nothing at the server."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from anatomynet.client import region_keeper
from anatomynet.client.region_keeper import RegionKeeper, free_kept_regions
from anatomynet.client.shared_memory import SharedRegion
from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.runtime import Runtime, load_runtime
from tests.random_network import smooth_hu
from tests.shared_regions import MappingServer, assert_none_is_left, is_closed, registered_regions
from tests.triton_servers import RunningServer
from tests.waiting import WAIT_TIMEOUT_S, wait_until

SHAPE, SMALLER, LARGER = (3, 4, 5), (4, 7, 2), (3, 4, 6)
SHORT_S, LONG_S = 0.05, 3600.0
TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Timers of half an hour least of all."""
    yield
    free_kept_regions()
    assert_none_is_left()


@pytest.fixture
def server() -> MappingServer:
    return MappingServer()


@pytest.fixture
def keeper(server: MappingServer, monkeypatch: pytest.MonkeyPatch) -> RegionKeeper:
    """Keeps for as long as a test takes."""
    monkeypatch.setattr(region_keeper, "KEPT_S", LONG_S)
    return keeper_of(server)


def keeper_of(server: MappingServer) -> RegionKeeper:
    return RegionKeeper(cast(Any, server), TIMEOUT_S)


def region_for(
    keeper: RegionKeeper, shape: tuple[int, ...], timeout_s: float = TIMEOUT_S
) -> AbstractContextManager[SharedRegion]:
    return keeper.region_for(shape, timeout_s=timeout_s)


def answered(keeper: RegionKeeper, shape: tuple[int, ...] = SHAPE, timeout_s: float = TIMEOUT_S) -> SharedRegion:
    """The region that a volume went through."""
    with region_for(keeper, shape, timeout_s) as region:
        region.write(np.ones(shape, np.int16))
        os.pwrite(region.descriptor, bytes(region.label_bytes), region.hu_bytes)
        assert not region.read_labels().any()
    return region


# --- which region a volume gets


def test_the_next_volume_gets_the_same_region(server: MappingServer, keeper: RegionKeeper) -> None:
    first = answered(keeper)
    assert first.memory is None  # a file is written sooner than a mapping without pages
    for shape in (SMALLER, SHAPE):
        again = answered(keeper, shape)
        assert (again.name, again.shape, again.size) == (first.name, shape, first.size)
        assert again.memory is not None
    assert server.mapped == {first.name}


def test_a_larger_volume_gets_another_and_the_small_one_goes(server: MappingServer, keeper: RegionKeeper) -> None:
    small, large = answered(keeper), answered(keeper, LARGER)
    assert server.mapped == {large.name}
    assert small.name != large.name
    assert is_closed(small.descriptor) or small.descriptor == large.descriptor


def test_volumes_at_once_have_one_each(server: MappingServer, keeper: RegionKeeper) -> None:
    with region_for(keeper, SHAPE) as first, region_for(keeper, SHAPE) as second:
        assert server.mapped == {first.name, second.name}
    with region_for(keeper, SHAPE) as third, region_for(keeper, SHAPE) as fourth:
        assert {third.name, fourth.name} == {first.name, second.name}


def test_one_that_a_server_may_forget_too_soon_is_made_anew(server: MappingServer, keeper: RegionKeeper) -> None:
    first, longer = answered(keeper, timeout_s=60), answered(keeper, timeout_s=60 + 2 * region_keeper.LASTS_S)
    assert server.mapped == {longer.name}
    assert first.name != longer.name


def test_one_that_cannot_be_mapped_is_made_anew(
    server: MappingServer, keeper: RegionKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mapped(self: SharedRegion) -> SharedRegion:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    first = answered(keeper)
    monkeypatch.setattr(SharedRegion, "mapped", mapped)
    second = answered(keeper)
    assert server.mapped == {second.name}
    assert first.name != second.name


# --- how long it is kept


def test_one_that_was_left_by_an_exception_goes(server: MappingServer, keeper: RegionKeeper) -> None:
    answered(keeper)
    with pytest.raises(KeyboardInterrupt), region_for(keeper, SHAPE) as region:
        raise KeyboardInterrupt
    assert server.mapped == set()
    assert is_closed(region.descriptor)
    assert region.memory is not None
    assert region.memory.closed


def test_an_idle_one_goes_however_busy_another_is(server: MappingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of volumes at once one stays behind: a patient's voxels in it would stay as long as others' volumes come."""
    keeper = keeper_of(server)
    monkeypatch.setattr(region_keeper, "KEPT_S", LONG_S)
    with region_for(keeper, SHAPE) as busy:
        monkeypatch.setattr(region_keeper, "KEPT_S", SHORT_S)
        with region_for(keeper, SHAPE) as idle:
            pass
        monkeypatch.setattr(region_keeper, "KEPT_S", LONG_S)
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while idle.name in server.mapped:
        assert answered(keeper).name == busy.name
        assert time.monotonic() < deadline
    assert server.mapped == {busy.name}
    monkeypatch.setattr(region_keeper, "KEPT_S", SHORT_S)
    assert answered(keeper).name == busy.name
    wait_until(lambda: not server.mapped, "the busy one goes too, once it is idle")


def test_one_in_use_has_no_time_to_go(server: MappingServer, keeper: RegionKeeper) -> None:
    def waiting() -> list[threading.Thread]:
        timers = (thread for thread in threading.enumerate() if isinstance(thread, threading.Timer))
        return [timer for timer in timers if not timer.finished.is_set()]

    answered(keeper)
    assert len(waiting()) == 1
    with region_for(keeper, SHAPE):
        assert waiting() == []


def test_where_no_thread_can_wait_it_goes_at_once(
    server: MappingServer, keeper: RegionKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    region = answered(keeper)
    assert server.mapped == set()
    assert is_closed(region.descriptor)


def test_those_in_use_stay(server: MappingServer, keeper: RegionKeeper) -> None:
    with region_for(keeper, SHAPE) as region:
        assert not free_kept_regions()
        assert server.mapped == {region.name}
    assert free_kept_regions()
    assert server.mapped == set()
    assert not free_kept_regions()


def test_all_keepers_are_asked(server: MappingServer, keeper: RegionKeeper) -> None:
    other_server = MappingServer()
    answered(keeper)
    answered(keeper_of(other_server))
    assert free_kept_regions()
    assert server.mapped | other_server.mapped == set()


def test_the_end_waits_for_what_is_being_freed_and_a_volume_does_not(
    server: MappingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(region_keeper, "KEPT_S", SHORT_S)
    keeper = keeper_of(server)
    server.allowed.clear()
    idle = answered(keeper)
    wait_until(lambda: server.asked_to_let_go, "an idle region is being freed")
    with region_for(keeper, SHAPE) as another:
        assert another.name != idle.name
        end = threading.Thread(target=keeper.free_kept)
        end.start()
        end.join(0.2)
        assert end.is_alive()
        server.allowed.set()
        end.join(WAIT_TIMEOUT_S)
        assert server.mapped == {another.name}


# --- at a real server


@pytest.fixture(scope="module")
def embedded(random_onnx_files: tuple[Path, Path]) -> Runtime:
    return load_runtime(random_onnx_files[0])


@pytest.fixture
def new_regions(triton_server: RunningServer) -> Callable[[], set[str]]:
    """What the server has mapped since the test began: killed clients of tests before have left theirs."""
    before = registered_regions(triton_server.url)
    return lambda: registered_regions(triton_server.url) - before


def test_volumes_in_a_kept_region_are_drawn_as_any(
    triton_server: RunningServer, embedded: Runtime, new_regions: Callable[[], set[str]]
) -> None:
    """The second is as large, the third smaller, of another shape and a view; then one that needs another region."""
    whole, large = smooth_hu((24, 96, 128)), smooth_hu((32, 96, 128))
    names = []
    with TritonRuntime(triton_server.url, shared_memory="on") as runtime:
        for hu in (whole, whole[::-1], whole[::-1, 48:, ::2], large):
            expected, confidence = embedded.infer(np.ascontiguousarray(hu))
            labels, found = runtime.infer(hu)
            np.testing.assert_array_equal(labels, expected)
            np.testing.assert_array_equal(found, confidence)
            (name,) = new_regions()
            names.append(name)
    assert names[0] == names[1] == names[2] != names[3]
    assert new_regions() == set()


def test_an_idle_one_goes_at_a_real_server(
    triton_server: RunningServer, new_regions: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hu = smooth_hu((8, 32, 32))
    with TritonRuntime(triton_server.url, shared_memory="on") as runtime:
        monkeypatch.setattr(region_keeper, "KEPT_S", LONG_S)
        runtime.infer(hu)
        assert len(new_regions()) == 1
        monkeypatch.setattr(region_keeper, "KEPT_S", SHORT_S)
        runtime.infer(hu)
        wait_until(lambda: not new_regions(), "an idle region goes")


UNCLOSED_CLIENT = """
import sys
import numpy as np
from anatomynet.client import region_keeper
from anatomynet.client.triton import TritonRuntime
from tests.shared_regions import registered_regions
region_keeper.KEPT_S = 3600.0
runtime = TritonRuntime(sys.argv[1], shared_memory="on")
runtime.infer(np.zeros((8, 32, 32), np.int16))
print(*registered_regions(sys.argv[1]))
"""


def test_who_never_closes_leaves_nothing_at_the_server(
    triton_server: RunningServer, new_regions: Callable[[], set[str]]
) -> None:
    before = registered_regions(triton_server.url)
    run = subprocess.run(
        [sys.executable, "-c", UNCLOSED_CLIENT, triton_server.url],
        capture_output=True,
        text=True,
        timeout=WAIT_TIMEOUT_S,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert len(set(run.stdout.split()) - before) == 1
    assert new_regions() == set()


def test_one_that_another_connection_keeps_makes_room(
    triton_server: RunningServer,
    embedded: Runtime,
    new_regions: Callable[[], set[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hu, really_allocate = smooth_hu((8, 32, 32)), os.posix_fallocate

    def allocate(descriptor: int, offset: int, length: int) -> None:
        if kept & new_regions():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really_allocate(descriptor, offset, length)

    monkeypatch.setattr(region_keeper, "KEPT_S", LONG_S)
    with (
        TritonRuntime(triton_server.url, shared_memory="on") as first,
        TritonRuntime(triton_server.url, shared_memory="on") as second,
    ):
        first.infer(hu)
        kept = new_regions()
        assert len(kept) == 1
        monkeypatch.setattr(os, "posix_fallocate", allocate)
        np.testing.assert_array_equal(second.infer(hu)[0], embedded.infer(hu)[0])
        assert not kept & new_regions()
