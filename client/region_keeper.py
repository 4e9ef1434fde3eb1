"""Regions of shared memory that outlive a volume: the next one finds its pages there, on both sides.

To make a region, and to fault its pages in, takes longer than to copy a volume into it (benchmarks.transport). So a
region whose volume was answered is kept for the next one, for a few seconds; where memory is short it goes at once.
"""

import atexit
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from anatomynet.client.shared_memory import SharedRegion, free_region, make_region

if TYPE_CHECKING:
    from tritonclient.grpc import InferenceServerClient

# Longer than a study's next steps take, before its client brings another volume. A patient's voxels stay so long.
KEPT_S = 5.0
# After so long a region is made anew, however many volumes follow each other: where they are smaller, some of an
# earlier one's voxels stay so long, and a server may forget a killed client's region so much later.
LASTS_S = 60.0

_keepers: "weakref.WeakSet[RegionKeeper]" = weakref.WeakSet()
_keepers_lock = threading.Lock()


@atexit.register  # who never closes a connection leaves nothing at its server
def free_kept_regions() -> bool:
    """Frees what this process keeps and does not use, at all its servers; whether there was any."""
    with _keepers_lock:
        keepers = list(_keepers)
    freed = [keeper.free_kept() for keeper in keepers]
    return any(freed)


class RegionKeeper:
    """The regions that this process shares with one server.

    Args:
        client: of the server.
        answer_timeout_s: for the server to map a region, or to let go of one.
    """

    def __init__(self, client: "InferenceServerClient", answer_timeout_s: float) -> None:
        self._client = client
        self._answer_timeout_s = answer_timeout_s
        # By name, each with what frees it when it was idle for too long. Whoever pops it, in one step, has it alone.
        self._kept: dict[str, tuple[SharedRegion, threading.Timer]] = {}
        # Who closes, or ends the process, waits for a timer that is freeing; who brings a volume does not.
        self._freeing = threading.Lock()
        with _keepers_lock:
            _keepers.add(self)

    @contextmanager
    def region_for(self, shape: tuple[int, ...], *, timeout_s: float) -> Iterator[SharedRegion]:
        """A region that is this block's alone. What leaves it by an exception frees the region: a request that was
        given up may still write to it.

        Args:
            shape: of the volume, (z, y, x).
            timeout_s: after which no request uses it any more.

        Raises:
            NotSharedError: the server does not map it, or there is too little of it.
            AttemptError: the server is gone.
        """
        answer_timeout_s = min(timeout_s, self._answer_timeout_s)
        region = self._kept_for(shape, timeout_s) or make_region(
            self._client, shape, lasts_s=timeout_s + LASTS_S, answer_timeout_s=answer_timeout_s
        )
        try:
            yield region
        except BaseException:
            free_region(self._client, region, answer_timeout_s=answer_timeout_s)
            raise
        self._keep(region)

    def free_kept(self) -> bool:
        """Frees those that are not in use; whether there was any."""
        any_kept = False
        with self._freeing:
            while region := self._taken():
                free_region(self._client, region, answer_timeout_s=self._answer_timeout_s)
                any_kept = True
        return any_kept

    def _kept_for(self, shape: tuple[int, ...], timeout_s: float) -> SharedRegion | None:
        """One that is large enough and lasts long enough, with a mapping; those that are not are freed."""
        while kept := self._taken():
            region = replace(kept, shape=shape)
            if region.hu_bytes + region.label_bytes <= region.size and time.time() + timeout_s <= region.expiry:
                with suppress(OSError):  # too many mappings
                    return region.mapped()
            free_region(self._client, region, answer_timeout_s=min(timeout_s, self._answer_timeout_s))
        return None

    def _taken(self) -> SharedRegion | None:
        """The one that was used last, which is kept no longer."""
        try:
            _, (region, timer) = self._kept.popitem()
        except KeyError:
            return None
        timer.cancel()
        return region

    def _keep(self, region: SharedRegion) -> None:
        timer = threading.Timer(KEPT_S, self._free_idle, [region.name])
        timer.daemon = True
        self._kept[region.name] = region, timer
        try:
            timer.start()
        except RuntimeError:  # no more threads
            self._free_idle(region.name)

    def _free_idle(self, name: str) -> None:
        with self._freeing:
            if kept := self._kept.pop(name, None):
                free_region(self._client, kept[0], answer_timeout_s=self._answer_timeout_s)
