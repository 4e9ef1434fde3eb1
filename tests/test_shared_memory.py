"""A region holds a volume and its label map one after the other, as the server is told, whether as a file or mapped."""

import mmap
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from anatomynet.client import shared_memory
from anatomynet.client.shared_memory import JANITOR, NotSharedError, SharedRegion, free_region, make_region
from anatomynet.engine.volume import HounsfieldArray, LabelArray
from tests.shared_regions import MappingServer, is_closed

SHAPE = (50, 4, 5)  # more slices than one thread copies at a time
COUNT = 1000
HU = np.random.default_rng(1808).integers(-1024, 3072, (100, 4, 10), dtype=np.int16)
LABELS: LabelArray = np.random.default_rng(1808).integers(0, 7, SHAPE, dtype=np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "region"
    path.write_bytes(bytes(3 * COUNT))
    return path


@pytest.fixture(params=["as a file", "mapped"])
def region(path: Path, request: pytest.FixtureRequest) -> Iterator[SharedRegion]:
    with path.open("r+b") as file:
        region = SharedRegion("", file.fileno(), SHAPE, expiry=0.0)
        yield region.mapped() if request.param == "mapped" else region


def answer(region: SharedRegion) -> None:
    """As the server does."""
    os.pwrite(region.descriptor, LABELS.tobytes(), region.hu_bytes)


def test_a_view_is_written_as_it_looks_and_labels_are_read_behind_it(region: SharedRegion, path: Path) -> None:
    view = HU[::-2, ::-1, 1::2]
    assert (region.hu_bytes, region.label_bytes, region.size) == (2 * COUNT, COUNT, 3 * COUNT)
    region.write(view)
    answer(region)
    np.testing.assert_array_equal(region.read_labels(), LABELS)
    assert path.read_bytes() == view.tobytes() + LABELS.tobytes()


@pytest.mark.parametrize("dtype", [">i2", "<i4"])
def test_numbers_of_another_type_are_written_as_int16(region: SharedRegion, path: Path, dtype: str) -> None:
    """Who calls it may have them from a file of another byte order."""
    hu = HU[:50, :, :5].copy()
    region.write(hu.astype(dtype))
    assert path.read_bytes()[: 2 * COUNT] == hu.tobytes()


def test_labels_lie_in_their_pages_as_in_the_regions(region: SharedRegion) -> None:
    """Else some processors copy them at a quarter of their speed."""
    assert region.read_labels().ctypes.data % mmap.PAGESIZE == 2 * COUNT


def test_labels_that_no_server_wrote_are_not_another_volumes(path: Path) -> None:
    """Of the same shape they would look right."""
    with path.open("r+b") as file:
        region = SharedRegion("", file.fileno(), SHAPE, expiry=0.0).mapped()
        region.write(HU[::2, :, ::2])
        answer(region)
        region.read_labels()
        region.write(HU[1::2, :, ::2])
        with pytest.raises(NotSharedError, match="did not write the label map"):
            region.read_labels()


@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_mapping_is_copied_by_as_many_threads_as_can_be_started(
    path: Path, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    really_start, started = threading.Thread.start, list[threading.Thread]()

    def start(self: threading.Thread) -> None:
        if len(started) == more:
            raise RuntimeError("can't start new thread")
        started.append(self)
        really_start(self)

    monkeypatch.setattr(shared_memory, "available_cores", lambda: 4)
    monkeypatch.setattr(threading.Thread, "start", start)
    view = HU[::-2, ::-1, 1::2]
    with path.open("r+b") as file:
        region = SharedRegion("", file.fileno(), SHAPE, expiry=0.0).mapped()
        region.write(view)
        answer(region)
        np.testing.assert_array_equal(region.read_labels(), LABELS)
    assert path.read_bytes()[: 2 * COUNT] == view.tobytes()
    assert not any(thread.is_alive() for thread in started)


def test_a_copy_that_fails_in_another_thread_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_copy, this_thread = np.copyto, threading.current_thread()
    other_began = threading.Event()

    def copy(target: HounsfieldArray, source: HounsfieldArray) -> None:
        if threading.current_thread() is not this_thread:
            other_began.set()
            raise MemoryError
        assert other_began.wait(60)
        really_copy(target, source)

    monkeypatch.setattr(shared_memory, "available_cores", lambda: 2)
    monkeypatch.setattr(np, "copyto", copy)
    with path.open("r+b") as file, pytest.raises(MemoryError):
        SharedRegion("", file.fileno(), SHAPE, expiry=0.0).mapped().read_labels()


def test_too_little_memory_is_told() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(NotSharedError, match="No space left on device"):
            SharedRegion("", descriptor, SHAPE, expiry=0.0).write(HU[::2, :, ::2])
    finally:
        os.close(descriptor)


# --- how it goes


def made_region(server: MappingServer) -> SharedRegion:
    return make_region(cast(Any, server), SHAPE, lasts_s=60, answer_timeout_s=60)


def free(server: MappingServer, region: SharedRegion) -> None:
    free_region(cast(Any, server), region, answer_timeout_s=60)


@pytest.mark.parametrize("mapped", [False, True])
def test_nothing_holds_a_freed_regions_memory(mapped: bool) -> None:
    server = MappingServer()
    region = made_region(server)
    assert server.mapped == {region.name}
    region.write(HU[::2, :, ::2])
    if mapped:
        region = region.mapped()
        region.write(HU[::2, :, ::2])
        answer(region)
        region.read_labels()
    free(server, region)
    assert server.mapped == set()
    assert is_closed(region.descriptor)
    assert region.memory is None or region.memory.closed


@pytest.mark.parametrize("failure", ["gone", "silent", "closed"])
def test_pages_go_even_if_the_server_cannot_be_told(failure: str) -> None:
    """It still has the region mapped; it is asked once, for each time may take as long as its time-out."""
    utils = pytest.importorskip("tritonclient.utils")
    failures = {
        "gone": utils.InferenceServerException("Connection refused", status="StatusCode.UNAVAILABLE"),
        "silent": utils.InferenceServerException("Deadline Exceeded", status="StatusCode.DEADLINE_EXCEEDED"),
        "closed": ValueError("Cannot invoke RPC on closed channel!"),
    }
    server = MappingServer()
    server.failure = failures[failure]
    region = made_region(server)
    with mmap.mmap(region.descriptor, region.size) as at_the_server:
        region.write(HU[::2, :, ::2])
        assert any(at_the_server[:])
        free(server, region)
        assert not any(at_the_server[:])
    assert is_closed(region.descriptor)
    assert server.asked_to_let_go == [region.name]


@pytest.mark.parametrize(("told", "left"), [(b"\n", True), (b"", False)])
def test_the_janitor_removes_what_nobody_told_it_was_removed(tmp_path: Path, told: bytes, left: bool) -> None:
    path = tmp_path / "region"
    path.touch()
    subprocess.run(["/bin/sh", "-c", JANITOR, str(path)], input=told, check=True, timeout=60)
    assert path.exists() == left
