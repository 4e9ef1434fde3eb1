"""Memory that this process and a Triton server on the same machine share: how a volume crosses by one copy.

A tensor in shared memory has no gaps, and the box that is sent is known only once the study is read, so decoding slices
straight into a region could save that copy only by sending the whole volume. A region's first volume is written as a
file, slice by slice: for a whole study that takes two thirds of what a mapping does, whose every page is first zeroed
and then faulted in (benchmarks.transport). The next one, whose pages are there, goes through a mapping, by several
threads.

Nothing stays in /dev/shm however this process ends: a region's file has no name any more before a voxel is in it, and
while it has one a small shell waits beside to remove it.
"""

import errno
import mmap
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anatomynet.client.failures import Outlook, attempt_error, outlook_of, reason_of
from anatomynet.engine.machine import available_cores
from anatomynet.engine.volume import HounsfieldArray, LabelArray

if TYPE_CHECKING:
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

SHARED_MEMORY_FOLDER = Path("/dev/shm")
REGION_PREFIX = "anatomynet-"
# So long after its time-out a cancelled request may still write to its region.
REGION_GRACE_S = 600
LARGEST_READ = 2**30  # one call reads 2 GiB at most
# What one of the threads copies at a time that share a mapping's work, and how many at most. Small shares, so that all
# threads end together.
SLICES_A_COPY = 4
COPIERS = 16
# No structure has this label. It stands on each page of the label map's memory until the server has written that: else,
# if it did not, an earlier volume's labels would be taken for its answer.
UNWRITTEN = 255
RELEASE_PAUSES_S = (0.0, 0.01, 0.04)
# What Triton says of a region that it would have mapped, were it there; a server that refuses says something else.
ALLOWED_BUT_NOT_THERE = "Unable to open shared memory region"
# A line on stdin means: the file has no name any more. If stdin ends without one, its owner died: remove the file. A
# service that is stopped has all its processes told to end: the janitor is the last.
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
        expiry: time.time() after which no request may use it any more.
        memory: all of the file, once every page of it is there; before, it is written and read as a file.
    """

    name: str
    descriptor: int
    shape: tuple[int, ...]
    expiry: float
    memory: mmap.mmap | None = None

    @property
    def size(self) -> int:
        """Bytes of the file, as many as the volume and its label map take, or more."""
        return os.fstat(self.descriptor).st_size

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
        if self.memory is None:
            self._write_file(hu)
            return
        _copy(np.frombuffer(self.memory, np.int16, self.label_bytes).reshape(self.shape), hu)
        self._labels_in(self.memory)[:: mmap.PAGESIZE] = UNWRITTEN

    def read_labels(self) -> LabelArray:
        """Copies the label map out, uint8 (z, y, x).

        Raises:
            NotSharedError: the server has not written it.
        """
        labels = _empty_labels(self.shape, self.hu_bytes)
        if self.memory is None:
            bytes_ = labels.data.cast("B")
            for start in range(0, self.label_bytes, LARGEST_READ):
                os.preadv(self.descriptor, [bytes_[start : start + LARGEST_READ]], self.hu_bytes + start)
            return labels
        _copy(labels, self._labels_in(self.memory).reshape(self.shape))
        if np.any(labels.ravel()[:: mmap.PAGESIZE] == UNWRITTEN):
            raise NotSharedError("the server answered, and did not write the label map")
        return labels

    def mapped(self) -> "SharedRegion":
        """The same, with a mapping; only once a volume and its label map have filled it.

        Raises:
            OSError: it cannot be mapped.
        """
        return self if self.memory is not None else replace(self, memory=mmap.mmap(self.descriptor, self.size))

    def _labels_in(self, memory: mmap.mmap) -> NDArray[np.uint8]:
        return np.frombuffer(memory, np.uint8, self.label_bytes, self.hu_bytes)

    def _write_file(self, hu: HounsfieldArray) -> None:
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


def make_region(
    client: "InferenceServerClient", shape: tuple[int, ...], *, lasts_s: float, answer_timeout_s: float
) -> SharedRegion:
    """A region that this process and the server share until `free_region`.

    Args:
        shape: of the volume, (z, y, x).
        lasts_s: after which no request uses it any more.
        answer_timeout_s: for the server to map it.

    Raises:
        NotSharedError: the server does not map it, or there is too little of it.
        AttemptError: the server is gone.
    """
    from tritonclient.utils import InferenceServerException

    expiry = int(time.time() + lasts_s)
    name = f"{REGION_PREFIX}{expiry + REGION_GRACE_S}-{secrets.token_hex(8)}"
    size = 3 * int(np.prod(shape))
    try:
        with _named_file(SHARED_MEMORY_FOLDER / name) as descriptor:
            region = SharedRegion(name, descriptor, shape, expiry)
            os.truncate(descriptor, size)
            client.register_system_shared_memory(name, f"/{name}", size, client_timeout=answer_timeout_s)
            # Else a full /dev/shm (Docker's has 64 MB) would end the server at the first voxel that is too many.
            os.posix_fallocate(descriptor, region.hu_bytes, region.label_bytes)
            return replace(region, descriptor=os.dup(descriptor))
    except InferenceServerException as error:
        if _is_gone(error):
            raise attempt_error(error, "the server went away") from error
        raise NotSharedError(reason_of(error)) from error
    except OSError as error:
        _unregister(client, name, answer_timeout_s)
        raise _too_small(error, size) from error


def free_region(client: "InferenceServerClient", region: SharedRegion, *, answer_timeout_s: float) -> None:
    """Its memory is gone after this, even if the server cannot be told."""
    try:
        if not _unregister(client, region.name, answer_timeout_s):
            # A cancelled request that still computes holds on to the region; its pages can go.
            with mmap.mmap(region.descriptor, region.size) as memory:
                memory.madvise(mmap.MADV_REMOVE)
    finally:
        os.close(region.descriptor)
        if region.memory is not None:
            with suppress(BufferError):  # an exception still looks at it
                region.memory.close()


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


def _copy(target: NDArray[Any], source: NDArray[Any]) -> None:
    """By several threads; by this one alone where no more can be started."""
    starts = range(0, len(target), SLICES_A_COPY)
    left = iter(starts)  # hands out each to one thread

    def copy_what_is_left() -> None:
        for start in left:
            part = slice(start, start + SLICES_A_COPY)
            np.copyto(target[part], source[part])

    with ThreadPoolExecutor(COPIERS) as pool:
        helpers = []
        with suppress(RuntimeError):  # no more threads
            for _ in range(1, min(COPIERS, available_cores(), len(starts))):
                helpers.append(pool.submit(copy_what_is_left))
        copy_what_is_left()
    for helper in helpers:
        helper.result()


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
            if _is_gone(error):  # and the region with it, or it hears of this once it answers again
                return False
        except ValueError:  # the connection has been closed
            return False
        else:
            return True
    return False


def _is_gone(error: "InferenceServerException") -> bool:
    return outlook_of(error) is Outlook.LATER or error.status() == "StatusCode.DEADLINE_EXCEEDED"
