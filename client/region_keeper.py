"""Regions of shared memory that outlive a volume: the next one finds its pages there, on both sides.

To make a region, and to fault its pages in, takes longer than to copy a volume into it (benchmarks.transport). So a
region whose volume was answered is kept for the next one, for a few seconds; where memory is short it goes at once.
"""

import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from anatomynet.client.shared_memory import SharedRegion, free_region, make_region
from anatomynet.engine.runtime import available_cores

if TYPE_CHECKING:
    from tritonclient.grpc import InferenceServerClient

# Longer than a study's next steps take, before its client brings another volume. A patient's voxels stay so long.
KEPT_S = 5.0
# A region's name tells when its server may forget it: after so long it is made anew.
LASTS_S = 600.0
COPIERS = 8

_keepers: "weakref.WeakSet[RegionKeeper]" = weakref.WeakSet()


def free_kept_regions() -> bool:
    """Frees what this process keeps and does not use, at all its servers; whether there was any."""
    return any([keeper.free_kept() for keeper in list(_keepers)])


class RegionKeeper:
    """The regions that this process shares with one server.

    Args:
        client: of the server.
        answer_timeout_s: for the server to map a region, or to let go of one.

    Attributes:
        copiers: threads that copy volumes into regions, and label maps out of them.
    """

    def __init__(self, client: "InferenceServerClient", answer_timeout_s: float) -> None:
        self._client = client
        self._answer_timeout_s = answer_timeout_s
        self._lock = threading.Lock()
        self._kept: list[SharedRegion] = []
        self._timer: threading.Timer | None = None
        self.copiers = ThreadPoolExecutor(min(COPIERS, available_cores()))
        _keepers.add(self)
        # Who never closes it leaves nothing at the server.
        weakref.finalize(self, _free_all, client, self._kept, answer_timeout_s)

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
        with self._lock:
            if self._timer:
                self._timer.cancel()
            any_kept = bool(self._kept)
            _free_all(self._client, self._kept, self._answer_timeout_s)
        return any_kept

    def close(self) -> None:
        """Frees them. Whoever uses it again keeps what that takes until the process ends, or for some seconds."""
        self.free_kept()
        self.copiers.shutdown(wait=False)

    def _kept_for(self, shape: tuple[int, ...], timeout_s: float) -> SharedRegion | None:
        """One that is large enough and lasts long enough, with a mapping; those that are not are freed."""
        with self._lock:
            while self._kept:
                region = replace(self._kept.pop(), shape=shape)
                if region.hu_bytes + region.label_bytes <= region.size and time.time() + timeout_s <= region.expiry:
                    with suppress(OSError, ValueError):  # too many mappings
                        return region.mapped()
                free_region(self._client, region, answer_timeout_s=self._answer_timeout_s)
        return None

    def _keep(self, region: SharedRegion) -> None:
        with self._lock:
            self._kept.append(region)
            if self._timer:
                self._timer.cancel()
            self._timer = threading.Timer(KEPT_S, self.free_kept)
            self._timer.daemon = True
            try:
                self._timer.start()
            except RuntimeError:  # no more threads
                self._timer = None
                _free_all(self._client, self._kept, self._answer_timeout_s)


def _free_all(client: "InferenceServerClient", regions: list[SharedRegion], answer_timeout_s: float) -> None:
    while regions:
        with suppress(ValueError):  # the connection is closed: the region goes, and the server forgets it later
            free_region(client, regions.pop(), answer_timeout_s=answer_timeout_s)
