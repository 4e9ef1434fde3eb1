"""The client's shared-memory regions that have a name.

Other programs of this machine have theirs, a killed run of these tests and one beside this among them. A region that is
being set up loses its name in a moment; one that was left behind keeps it.
"""

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
