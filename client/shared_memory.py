"""Memory that this process and a Triton server on the same machine share: how a volume crosses by one copy.

A tensor in shared memory has no gaps, and the box that is sent is known only once the study is read, so decoding slices
straight into a region could save that copy only by sending the whole volume. It is written as a file, slice by slice:
that takes half of what a mapping does, whose every page is first zeroed and then faulted in (benchmarks.transport).

Nothing stays in /dev/shm however this process ends: a region's file has no name any more before a voxel is in it, and
while it has one a small shell waits beside to remove it.

Whoever waits for a label map does not wait for its region to go too: the server lets go of it while the labels are
read, and a thread frees its pages; where there is no room for the next one meanwhile, that waits for it.
"""

import errno
import mmap
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anatomynet.client.failures import Outlook, attempt_error, outlook_of, reason_of
from anatomynet.engine.volume import HounsfieldArray, LabelArray

if TYPE_CHECKING:
    from tritonclient.grpc import InferenceServerClient

SHARED_MEMORY_FOLDER = Path("/dev/shm")
REGION_PREFIX = "anatomynet-"
CLOSING = "anatomynet-region-closing"  # what the threads are called that free regions
# So long after its time-out a cancelled request may still write to its region.
REGION_GRACE_S = 600
LARGEST_READ = 2**30  # one call reads 2 GiB at most
RELEASE_PAUSES_S = (0.0, 0.01, 0.04)
# What Triton says of a region that it would have mapped, were it there; a server that refuses says something else.
ALLOWED_BUT_NOT_THERE = "Unable to open shared memory region"
# A line tells it that the file has no name any more. Its standard input ends without one when this process does, killed
# or not. A service that is stopped has all its processes told to end: the janitor is the last.
JANITOR = 'trap "" HUP INT TERM; read -r _ || rm -f -- "$0"'


class NotSharedError(Exception):
    """Shared memory cannot be used with this server; gRPC can."""


@dataclass(frozen=True)
class SharedRegion:
    """Memory for one volume and its label map, one after the other, that the server has mapped.

    Attributes:
        name: at the server.
        descriptor: of its file, which has no name any more.
        shape: of the volume, (z, y, x).
    """

    name: str
    descriptor: int
    shape: tuple[int, ...]

    @property
    def hu_bytes(self) -> int:
        """Of the volume; the label map begins after them."""
        return 2 * self.label_bytes

    @property
    def label_bytes(self) -> int:
        """Of the label map."""
        return int(np.prod(self.shape))

    def write(self, hu: HounsfieldArray) -> None:
        """Copies the volume in.

        Args:
            hu: int16 (z, y, x), of the region's shape; may be a view.

        Raises:
            NotSharedError: there is too little memory.
        """
        plane = np.empty(self.shape[1:], np.int16)  # stays in the processor's cache
        try:
            for k, ct_slice in enumerate(hu):
                source = ct_slice
                if not ct_slice.flags.c_contiguous or ct_slice.dtype != plane.dtype:
                    np.copyto(plane, ct_slice)
                    source = plane
                if os.pwrite(self.descriptor, source.data, k * plane.nbytes) < plane.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _too_small(error, self.hu_bytes) from error

    def read_labels(self) -> LabelArray:
        """Copies the label map out, uint8 (z, y, x)."""
        labels = _empty_labels(self.shape, self.hu_bytes)
        bytes_ = labels.data.cast("B")
        for start in range(0, self.label_bytes, LARGEST_READ):
            os.preadv(self.descriptor, [bytes_[start : start + LARGEST_READ]], self.hu_bytes + start)
        return labels


@contextmanager
def shared_region(
    client: "InferenceServerClient", shape: tuple[int, ...], *, timeout_s: float, answer_timeout_s: float
) -> Iterator[tuple[SharedRegion, Callable[[], None]]]:
    """A region that this process and the server share for as long as the block lasts.

    With it comes what lets the server go of it at once, to be called when it has answered, before the labels are read:
    reading does not need it any more, and both take their time.

    Args:
        shape: of the volume, (z, y, x).
        timeout_s: after which no request uses it any more.
        answer_timeout_s: for the server to map it, and to let go of it.

    Raises:
        NotSharedError: the server does not map it, or there is too little of it.
        AttemptError: the server is gone.
    """
    name = f"{REGION_PREFIX}{int(time.time() + timeout_s) + REGION_GRACE_S}-{secrets.token_hex(8)}"
    region = _registered(client, name, shape, answer_timeout_s)
    unregister = partial(_unregister, client, name, answer_timeout_s)
    letting_go: list[Future[bool]] = []
    with ThreadPoolExecutor(1) as beside, ExitStack() as at_last:

        def let_go() -> None:
            with suppress(RuntimeError):  # no more threads: after the block, then
                letting_go.append(beside.submit(unregister))

        # A volume without an answer may go by gRPC next, which may want the room.
        at_last.callback(lambda: (_close_beside if letting_go else os.close)(region.descriptor))
        try:
            yield region, let_go
        finally:
            if not (letting_go[0].result() if letting_go else unregister()):
                # A cancelled request that still computes holds on to the region; its pages can go.
                with mmap.mmap(region.descriptor, region.hu_bytes + region.label_bytes) as memory:
                    memory.madvise(mmap.MADV_REMOVE)


def free_abandoned_regions(client: "InferenceServerClient", answer_timeout_s: float) -> None:
    """Frees at the server what clients left there that were killed, or that stopped waiting."""
    from tritonclient.utils import InferenceServerException

    try:
        status = client.get_system_shared_memory_status(client_timeout=answer_timeout_s)
    except InferenceServerException:  # a server that refuses will refuse the first region too
        return
    for name in status.regions:
        expiry = name.removeprefix(REGION_PREFIX).split("-")[0]
        if name.startswith(REGION_PREFIX) and expiry.isdecimal() and int(expiry) < time.time():
            _unregister(client, name, answer_timeout_s)


def maps_regions(client: "InferenceServerClient", answer_timeout_s: float) -> bool:
    """Whether the server would map a region for this client."""
    from tritonclient.utils import InferenceServerException

    name = f"{REGION_PREFIX}not-there-{secrets.token_hex(8)}"
    try:
        client.register_system_shared_memory(name, f"/{name}", 1, client_timeout=answer_timeout_s)
    except InferenceServerException as error:
        return ALLOWED_BUT_NOT_THERE in str(error.message())
    _unregister(client, name, answer_timeout_s)
    return True


def _registered(
    client: "InferenceServerClient", name: str, shape: tuple[int, ...], answer_timeout_s: float
) -> SharedRegion:
    from tritonclient.utils import InferenceServerException

    size = 3 * int(np.prod(shape))
    try:
        _wait_for_room(size)
        with _named_file(SHARED_MEMORY_FOLDER / name) as descriptor:
            region = SharedRegion(name, descriptor, shape)
            os.truncate(descriptor, size)
            client.register_system_shared_memory(name, f"/{name}", size, client_timeout=answer_timeout_s)
            # Else a full /dev/shm (Docker's has 64 MB) would end the server at the first voxel that is too many.
            os.posix_fallocate(descriptor, region.hu_bytes, region.label_bytes)
            return replace(region, descriptor=os.dup(descriptor))
    except InferenceServerException as error:
        if outlook_of(error) is Outlook.LATER or error.status() == "StatusCode.DEADLINE_EXCEEDED":
            raise attempt_error(error, "the server went away") from error
        raise NotSharedError(reason_of(error)) from error
    except OSError as error:
        _unregister(client, name, answer_timeout_s)
        raise _too_small(error, size) from error


def _wait_for_room(size: int) -> None:
    """Where there is too little, until the regions before are freed.

    Raises:
        OSError: no such folder.
    """
    folder = os.statvfs(SHARED_MEMORY_FOLDER)
    if folder.f_bavail * folder.f_frsize < size:
        for closing in threading.enumerate():
            # One that another thread starts at this moment is listed, and cannot be waited for yet.
            if closing.name == CLOSING and closing.is_alive():
                closing.join()


def _close_beside(descriptor: int) -> None:
    """Closes a region's file, which frees its pages; this process ends no sooner."""
    try:
        threading.Thread(target=os.close, args=(descriptor,), name=CLOSING, daemon=False).start()
    except RuntimeError:  # no more threads
        os.close(descriptor)


def _empty_labels(shape: tuple[int, ...], offset: int) -> LabelArray:
    """uint8, as far into a page as the region's own, which begin at `offset`: where it is 16 bytes further, as NumPy's
    arrays would have it, some processors copy at a quarter of their speed."""
    count = int(np.prod(shape))
    memory = np.empty(count + mmap.PAGESIZE, np.uint8)
    start = (offset - memory.ctypes.data) % mmap.PAGESIZE
    return memory[start : start + count].reshape(shape)


def _too_small(error: OSError, size: int) -> NotSharedError:
    return NotSharedError(f"{SHARED_MEMORY_FOLDER}: {error.strerror} for {size >> 20} MiB")


@contextmanager
def _named_file(path: Path) -> Iterator[int]:
    """A new file's descriptor; the file has its name for as long as the block lasts, and this process lives."""
    janitor = subprocess.Popen(
        ["/bin/sh", "-c", JANITOR, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a terminal's Ctrl-C is not for it
    )
    with janitor:  # which ends its standard input, and waits for it
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            yield descriptor
        finally:
            path.unlink()
            os.close(descriptor)
            janitor.communicate(b"\n")


def _unregister(client: "InferenceServerClient", name: str, answer_timeout_s: float) -> bool:
    """Whether the server has let go of a region: for a moment after its answer it may still hold on to it."""
    from tritonclient.utils import InferenceServerException

    for pause_s in RELEASE_PAUSES_S:
        time.sleep(pause_s)
        try:
            client.unregister_system_shared_memory(name, client_timeout=answer_timeout_s)
        except InferenceServerException as error:
            if outlook_of(error) is Outlook.LATER:  # it is gone, and the region with it
                return False
        else:
            return True
    return False
