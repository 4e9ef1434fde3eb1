"""Memory that this process and a Triton server on the same machine share: how a volume crosses by one copy.

A tensor in shared memory has no gaps, and the box that is sent is known only once the study is read, so decoding slices
straight into a region could save that copy only by sending the whole volume. A region's first volume is written as a
file, slice by slice: that takes half of what a mapping does, whose every page is first zeroed and then faulted in
(benchmarks.transport). The next one, whose pages are there, goes through a mapping, by several threads.

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
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anatomynet.client.failures import Outlook, attempt_error, outlook_of, reason_of
from anatomynet.engine.volume import HounsfieldArray, LabelArray

if TYPE_CHECKING:
    from tritonclient.grpc import InferenceServerClient

SHARED_MEMORY_FOLDER = Path("/dev/shm")
REGION_PREFIX = "anatomynet-"
# So long after its time-out a cancelled request may still write to its region.
REGION_GRACE_S = 600
LARGEST_READ = 2**30  # one call reads 2 GiB at most
SLICES_A_COPY = 16
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
        size: bytes of the file, as many as the volume and its label map take, or more.
        expiry: time.time() after which whoever comes may free it at the server.
        memory: uint8, all of the file, once every page of it is there; before, it is written and read as a file.
    """

    name: str
    descriptor: int
    shape: tuple[int, ...]
    size: int
    expiry: float
    memory: NDArray[np.uint8] | None = None

    @property
    def hu_bytes(self) -> int:
        """Of the volume; the label map begins after them."""
        return 2 * self.label_bytes

    @property
    def label_bytes(self) -> int:
        """Of the label map."""
        return int(np.prod(self.shape))

    def write(self, hu: HounsfieldArray, copiers: Executor) -> None:
        """Copies the volume in.

        Args:
            hu: int16 (z, y, x), of the region's shape; may be a view.
            copiers: threads that share the work, where there is a mapping.

        Raises:
            NotSharedError: there is too little memory.
        """
        if self.memory is None:
            self._write_file(hu)
            return
        target = self.memory[: self.hu_bytes].view(np.int16).reshape(self.shape)
        list(copiers.map(lambda part: np.copyto(target[part], hu[part]), _parts(self.shape)))

    def read_labels(self, copiers: Executor) -> LabelArray:
        """Copies the label map out, uint8 (z, y, x); `copiers` as in `write`."""
        labels = _empty_labels(self.shape, self.hu_bytes)
        if self.memory is None:
            bytes_ = labels.data.cast("B")
            for start in range(0, self.label_bytes, LARGEST_READ):
                os.preadv(self.descriptor, [bytes_[start : start + LARGEST_READ]], self.hu_bytes + start)
            return labels
        source = self.memory[self.hu_bytes : self.hu_bytes + self.label_bytes].reshape(self.shape)
        list(copiers.map(lambda part: np.copyto(labels[part], source[part]), _parts(self.shape)))
        return labels

    def mapped(self) -> "SharedRegion":
        """The same, with a mapping; only once the volume and its label map have been in it.

        Raises:
            OSError, ValueError: it cannot be mapped.
        """
        if self.memory is not None:
            return self
        return replace(self, memory=np.frombuffer(mmap.mmap(self.descriptor, self.size), np.uint8))

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
            region = SharedRegion(name, descriptor, shape, size, expiry)
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


def free_region(client: "InferenceServerClient", region: SharedRegion, *, answer_timeout_s: float) -> None:
    """Its memory is gone after this, even if the server cannot be told."""
    try:
        if not _unregister(client, region.name, answer_timeout_s):
            # A cancelled request that still computes holds on to the region; its pages can go.
            with mmap.mmap(region.descriptor, region.size) as memory:
                memory.madvise(mmap.MADV_REMOVE)
    finally:
        os.close(region.descriptor)


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


def _parts(shape: tuple[int, ...]) -> list[slice]:
    """Slices of a volume that one thread copies at a time."""
    return [slice(start, start + SLICES_A_COPY) for start in range(0, shape[0], SLICES_A_COPY)]


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
