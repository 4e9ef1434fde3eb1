"""The client's shared-memory regions: those that have a name, and those that a server has mapped.

Of the former other programs of this machine have theirs, a killed run of these tests and one beside this among them. A
region that is being set up loses its name in a moment; one that was left behind keeps it.
"""

import threading
from contextlib import suppress
from pathlib import Path

from anatomynet.client.shared_memory import REGION_PREFIX, SHARED_MEMORY_FOLDER
from tests.waiting import wait_until


def _named_regions() -> set[str]:
    return {path.name for path in SHARED_MEMORY_FOLDER.glob(f"{REGION_PREFIX}*")}


_BEFORE = _named_regions()


def assert_none_is_left() -> None:
    """Of those that have a name now, every one loses it."""
    found = _named_regions() - _BEFORE
    wait_until(lambda: not found & _named_regions(), f"{found} are freed")


def has_named_region(pid: int) -> bool:
    """Whether a process has one open."""
    with suppress(OSError):  # files come and go, and so does the process
        names = {file.readlink().name for file in Path(f"/proc/{pid}/fd").iterdir()}
        return bool(names & _named_regions())
    return False


def registered_regions(url: str) -> set[str]:
    """What a real server has mapped."""
    from tritonclient.grpc import InferenceServerClient

    with InferenceServerClient(url) as client:
        return set(client.get_system_shared_memory_status().regions)


class MappingServer:
    """Maps every region that it is asked to; to let go of one takes it until `allowed` is set, or fails."""

    def __init__(self) -> None:
        self.mapped: set[str] = set()
        self.asked_to_let_go: list[str] = []
        self.allowed = threading.Event()
        self.allowed.set()
        self.failure: Exception | None = None

    def register_system_shared_memory(self, name: str, key: str, byte_size: int, client_timeout: float) -> None:
        assert Path(f"/dev/shm{key}").stat().st_size == byte_size
        self.mapped.add(name)

    def unregister_system_shared_memory(self, name: str, client_timeout: float) -> None:
        self.asked_to_let_go.append(name)
        assert self.allowed.wait(client_timeout)
        if self.failure:
            raise self.failure
        self.mapped.remove(name)


def is_closed(descriptor: int) -> bool:
    """Whether a region's file is; right as long as this process has opened nothing since."""
    return not Path(f"/proc/self/fd/{descriptor}").exists()
