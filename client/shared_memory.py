"""Memory that this process and a Triton server on the same machine share: how a volume crosses without a copy.

Nothing stays in /dev/shm however this process ends: a region's file has no name any more before a voxel is in it, and
while it has one a small shell waits beside to remove it.
"""

import mmap
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from anatomynet.client.failures import Outlook, attempt_error, outlook_of, reason_of

if TYPE_CHECKING:
    from tritonclient.grpc import InferenceServerClient

SHARED_MEMORY_FOLDER = Path("/dev/shm")
REGION_PREFIX = "anatomynet-"
# So long after its time-out a cancelled request may still write to its region.
REGION_GRACE_S = 600
RELEASE_PAUSES_S = (0.0, 0.01, 0.04)
# What Triton says of a region that it would have mapped, were it there; a server that refuses says something else.
ALLOWED_BUT_NOT_THERE = "Unable to open shared memory region"
# Its standard input ends when this process does, killed or not. A service that is stopped has all its processes
# told to end: the janitor is the last.
JANITOR = 'trap "" HUP INT TERM; read -r _; rm -f -- "$0"'


class NotSharedError(Exception):
    """Shared memory cannot be used with this server; gRPC can."""


@contextmanager
def shared_region(
    client: "InferenceServerClient", size: int, *, timeout_s: float, answer_timeout_s: float
) -> Iterator[tuple[str, mmap.mmap]]:
    """Memory that this process and the server have mapped, and its name at the server, for as long as the block lasts.

    Args:
        size: bytes.
        timeout_s: after which no request uses it any more.
        answer_timeout_s: for the server to map it, and to let go of it.

    Raises:
        NotSharedError: the server does not map it, or there is too little of it.
        AttemptError: the server is gone.
    """
    name = f"{REGION_PREFIX}{int(time.time() + timeout_s) + REGION_GRACE_S}-{secrets.token_hex(8)}"
    memory = _registered(client, name, size, answer_timeout_s)
    try:
        yield name, memory
    finally:
        if not _unregister(client, name, answer_timeout_s):
            # A cancelled request that still computes holds on to the region; its pages can go.
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


def _registered(client: "InferenceServerClient", name: str, size: int, answer_timeout_s: float) -> mmap.mmap:
    from tritonclient.utils import InferenceServerException

    try:
        with _named_file(SHARED_MEMORY_FOLDER / name) as descriptor:
            os.truncate(descriptor, size)
            memory = mmap.mmap(descriptor, size)
            client.register_system_shared_memory(name, f"/{name}", size, client_timeout=answer_timeout_s)
            # Else a full /dev/shm (Docker's has 64 MB) would end this process at the first voxel that is too many.
            os.posix_fallocate(descriptor, 0, size)
    except InferenceServerException as error:
        if outlook_of(error) is Outlook.LATER or error.status() == "StatusCode.DEADLINE_EXCEEDED":
            raise attempt_error(error, "the server went away") from error
        raise NotSharedError(reason_of(error)) from error
    except OSError as error:
        _unregister(client, name, answer_timeout_s)
        raise NotSharedError(f"{SHARED_MEMORY_FOLDER}: {error.strerror} for {size >> 20} MiB") from error
    return memory


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
