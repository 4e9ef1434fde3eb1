"""A region holds a volume and its label map one after the other, as the server is told, and goes once it is read."""

import mmap
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from anatomynet.client import shared_memory
from anatomynet.client.shared_memory import JANITOR, NotSharedError, SharedRegion, shared_region
from tests.regions import assert_none_is_left
from tests.waiting import wait_until

SHAPE = (3, 4, 5)


def volume() -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    return np.random.default_rng(1808).integers(-1024, 3072, (6, 4, 10), dtype=np.int16)


def test_a_view_is_written_as_it_looks_and_labels_are_read_behind_it(tmp_path: Path) -> None:
    view = volume()[::-2, ::-1, 1::2]
    labels = np.arange(60, dtype=np.uint8).reshape(SHAPE)
    path = tmp_path / "region"
    path.write_bytes(bytes(120) + labels.tobytes())
    with path.open("r+b") as file:
        region = SharedRegion("", file.fileno(), SHAPE)
        assert (region.hu_bytes, region.label_bytes) == (120, 60)
        region.write(view)
        np.testing.assert_array_equal(region.read_labels(), labels)
    assert path.read_bytes() == view.tobytes() + labels.tobytes()


@pytest.mark.parametrize("dtype", [">i2", "<i4"])
def test_numbers_of_another_type_are_written_as_int16(tmp_path: Path, dtype: str) -> None:
    """Who calls it may have them from a file of another byte order."""
    hu = volume()[:3, :, :5].copy()
    path = tmp_path / "region"
    with path.open("w+b") as file:
        SharedRegion("", file.fileno(), SHAPE).write(hu.astype(dtype))
    assert path.read_bytes() == hu.tobytes()


def test_too_little_memory_is_told() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(NotSharedError, match="No space left on device"):
            SharedRegion("", descriptor, SHAPE).write(volume()[::2, :, ::2])
    finally:
        os.close(descriptor)


def test_labels_lie_in_their_pages_as_in_the_regions(tmp_path: Path) -> None:
    """Else some processors copy them at a quarter of their speed."""
    path = tmp_path / "region"
    path.write_bytes(bytes(180))
    with path.open("r+b") as file:
        assert SharedRegion("", file.fileno(), SHAPE).read_labels().ctypes.data % mmap.PAGESIZE == 120


class Server:
    """Maps every region that it is asked to; to let go of one takes it until `allowed` is set."""

    def __init__(self) -> None:
        self.mapped: set[str] = set()
        self.allowed = threading.Event()
        self.allowed.set()
        self.begun = threading.Event()

    def register_system_shared_memory(self, name: str, key: str, byte_size: int, client_timeout: float) -> None:
        assert Path(f"/dev/shm{key}").stat().st_size == byte_size
        self.mapped.add(name)

    def unregister_system_shared_memory(self, name: str, client_timeout: float) -> None:
        self.begun.set()
        assert self.allowed.wait(client_timeout)
        self.mapped.remove(name)


@contextmanager
def region_at(server: Server) -> Iterator[tuple[SharedRegion, Callable[[], None]]]:
    with shared_region(cast(Any, server), SHAPE, timeout_s=60, answer_timeout_s=60) as shared:
        yield shared


def test_a_server_lets_go_while_the_labels_are_read() -> None:
    server = Server()
    server.allowed.clear()
    with region_at(server) as (region, let_go):
        region.write(volume()[::2, :, ::2])
        let_go()
        assert server.begun.wait(60)
        assert not region.read_labels().any()
        assert server.mapped == {region.name}
        server.allowed.set()
    assert server.mapped == set()


def test_without_an_answer_a_region_is_gone_after_its_block() -> None:
    """By gRPC the volume wants the room next."""
    server = Server()
    with pytest.raises(ValueError, match="no answer"), region_at(server) as (region, _):
        raise ValueError("no answer")
    assert server.mapped == set()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(region.descriptor)


def test_where_no_thread_can_be_started_a_server_lets_go_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    server = Server()
    with region_at(server) as (region, let_go):
        monkeypatch.setattr(threading.Thread, "start", start)
        let_go()
        assert not region.read_labels().any()
    assert server.mapped == set()


def test_a_region_goes_even_if_its_server_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C, or a connection that was closed meanwhile."""
    server = Server()
    with pytest.raises(ValueError, match="closed channel"), region_at(server) as (region, _):
        monkeypatch.setattr(server, "unregister_system_shared_memory", closed_channel)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(region.descriptor)


def closed_channel(*_: object, **__: object) -> None:
    raise ValueError("Cannot invoke RPC on closed channel!")


@pytest.fixture
def slow_to_free(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A region that was read is closed once this is set."""
    allowed, really_close = threading.Event(), os.close

    def close(descriptor: int) -> None:
        if threading.current_thread().name == shared_memory.CLOSING:
            allowed.wait(60)
        really_close(descriptor)

    monkeypatch.setattr(os, "close", close)
    yield allowed
    allowed.set()
    wait_until(lambda: closing_threads() == [])


def closing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == shared_memory.CLOSING]


def free_bytes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=count, f_frsize=1))


def test_a_region_is_freed_beside_what_follows(slow_to_free: threading.Event) -> None:
    server = Server()
    for _ in range(2):
        with region_at(server) as (_, let_go):
            let_go()
    assert len(closing_threads()) == 2
    assert_none_is_left()


def test_where_there_is_no_room_the_next_region_waits_for_the_last(
    slow_to_free: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    with region_at(server) as (_, let_go):
        let_go()
    (closing,) = closing_threads()
    free_bytes(monkeypatch, 3 * int(np.prod(SHAPE)) - 1)
    allow = threading.Timer(0.2, slow_to_free.set)
    allow.start()
    with region_at(server):
        assert not closing.is_alive()
    allow.join()


def test_a_thread_that_another_is_starting_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    starting = threading.Thread(name=shared_memory.CLOSING)
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.current_thread(), starting])
    free_bytes(monkeypatch, 0)
    server = Server()
    with region_at(server):
        assert server.mapped


@pytest.mark.parametrize(("told", "left"), [(b"\n", True), (b"", False)])
def test_the_janitor_removes_what_nobody_told_it_was_removed(tmp_path: Path, told: bytes, left: bool) -> None:
    path = tmp_path / "region"
    path.touch()
    subprocess.run(["/bin/sh", "-c", JANITOR, str(path)], input=told, check=True, timeout=60)
    assert path.exists() == left
