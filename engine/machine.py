"""What this process may take of the machine, and in a container of its share: cores and memory."""

import math
import os
from pathlib import Path

from anatomynet.engine.errors import ModelError

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
UNLIMITED = 1 << 62


def available_cores() -> int:
    """CPU cores that this process may use: the affinity mask, and in a container its CPU limit (cgroup 2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, max(1, math.ceil(int(quota) / int(period))))


class MemoryGuard:
    """Refuses a CT for which there is too little memory, before the system ends the process in the middle.

    Args:
        bytes_a_voxel: that computing a CT takes. A runtime keeps them for the next one.
    """

    def __init__(self, bytes_a_voxel: float) -> None:
        self._bytes_a_voxel = bytes_a_voxel
        self._held = 0.0

    def check(self, shape: tuple[int, ...]) -> None:
        """Before a CT (z, y, x) is computed.

        Raises:
            ModelError: how much it would take, and how much is there.
        """
        needed, available = math.prod(shape) * self._bytes_a_voxel, available_memory() + self._held
        if needed > available:
            raise ModelError(
                f"CT of {shape} voxels (z, y, x) takes about {needed / 1e9:.1f} GB of memory, found "
                f"{available / 1e9:.1f} GB free: end other programs, or segment a part of the scan"
            )
        self._held = max(self._held, needed)


def available_memory() -> int:
    """Bytes that this process may still take: what the machine has left, and in a container its limit (cgroup 2)."""
    return min(_free_on_machine(), _free_in_cgroup())


def _free_on_machine() -> int:
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) << 10
    except (OSError, ValueError, StopIteration):  # no Linux
        return UNLIMITED


def _free_in_cgroup() -> int:
    try:
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return limit - used + int(statistics["inactive_file"])  # a cache that gives way
    except (OSError, ValueError, KeyError):  # no container, or "max"
        return UNLIMITED
