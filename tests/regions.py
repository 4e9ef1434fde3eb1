"""The client's shared-memory regions that have a name: those that came since the tests began.

Other programs of this machine, a killed run of these tests among them, may have left theirs.
"""

from anatomynet.client.shared_memory import REGION_PREFIX, SHARED_MEMORY_FOLDER


def _named_regions() -> set[str]:
    return {path.name for path in SHARED_MEMORY_FOLDER.glob(f"{REGION_PREFIX}*")}


_BEFORE = _named_regions()


def our_regions() -> set[str]:
    """Their names."""
    return _named_regions() - _BEFORE
