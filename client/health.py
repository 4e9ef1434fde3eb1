"""Can a server draw? A small phantom goes through `segment`, and the answer is held against the truth. Off the path.

`anatomynet-client info` tells it in words, `info --check` in one line and an exit status, as Nagios' plugins do. READY
is not enough: a Triton whose Python model has died goes on to answer that it is READY.
"""

import math
import time
from dataclasses import dataclass, replace
from enum import IntEnum

from anatomynet.client.connection import ServerOptions, connected, describe_runtime
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import AnatomyNetError, ServerBusyError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.metrics import dice
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.runtime import Runtime
from anatomynet.engine.segment import segment

# A head and its neck without the shoulders, at the coarsest spacing the model knows: half a second on two cores.
PHANTOM_MM = (254.0, 254.0, 216.0)  # x, y, z
# Less than this is too few voxels to judge by; the oesophagus lies below the phantom's end.
SMALLEST_JUDGED_ML = 2.0
# The shipped checkpoint's lowest is 0.8. A shifted, mirrored or mislabelled answer is near 0.
LOWEST_DSC = 0.5


class Status(IntEnum):
    """Exit status of a check, as Nagios reads it. Its 3, unknown, never comes: what cannot be asked is not healthy."""

    OK = 0
    WARNING = 1
    CRITICAL = 2


@dataclass(frozen=True)
class Probe:
    """One small real inference.

    Attributes:
        shape: voxels (z, y, x) of the phantom.
        seconds: from the volume to the label map, waiting in a queue included.
        dsc: Dice coefficient of each structure that was judged, by name.
    """

    shape: tuple[int, int, int]
    seconds: float
    dsc: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether every structure lies where it should; False where there was none to judge."""
        return bool(self.dsc) and min(self.dsc.values()) >= LOWEST_DSC

    @property
    def verdict(self) -> str:
        """One phrase: "6 structures where they should be, lowest DSC 0.79 (SpinalCord)"."""
        if not self.dsc:
            return f"no structure of {SMALLEST_JUDGED_ML:g} ml in the phantom to judge by"
        name = min(self.dsc, key=lambda structure: self.dsc[structure])
        lowest = f"DSC {self.dsc[name]:.2f} ({name})"
        if self.passed:
            return f"{len(self.dsc)} structures where they should be, lowest {lowest}"
        wrong = sum(value < LOWEST_DSC for value in self.dsc.values())
        return (
            f"{wrong} of {len(self.dsc)} structures not where they should be, lowest {lowest}, expected {LOWEST_DSC:g}"
        )


@dataclass(frozen=True)
class Health:
    """What a check found: `line` is the whole of its output."""

    status: Status
    line: str


def probe_runtime(runtime: Runtime) -> Probe:
    """Draws a small phantom and measures the answer.

    Raises:
        ServerError: the server refused or failed; a ServerBusyError where its queue is full.
        ModelError: an answer that does not fit the question.
    """
    geometry = phantom_geometry(runtime.model)
    volume, truth = make_phantom(geometry, structures=runtime.model.structures)
    start = time.perf_counter()
    drawn = segment(volume, runtime)
    seconds = time.perf_counter() - start
    dsc = {}
    for label, structure in enumerate(truth.structures, start=1):
        mask = truth.labels == label
        if mask.sum() * geometry.voxel_ml >= SMALLEST_JUDGED_ML:
            dsc[structure.name] = dice(drawn.labels == label, mask)
    return Probe(geometry.shape, seconds, dsc)


def phantom_geometry(model: ModelConfig) -> VolumeGeometry:
    """The grid of the phantom that a model is probed with."""
    spacing = model.largest_spacing
    x, y, z = (math.ceil(length / step) for length, step in zip(PHANTOM_MM, spacing, strict=True))
    return VolumeGeometry((z, y, x), spacing)


def check_health(server: ServerOptions) -> Health:
    """Asks as `segment` would, but once; every failure is an answer, none an exception.

    A full queue is a warning and not critical: who restarts a server for being busy makes the others busier.
    """
    try:
        with connected(replace(server, retries=False)) as runtime:
            probe, described = probe_runtime(runtime), describe_runtime(runtime)
    except ServerBusyError as error:
        return _health(Status.WARNING, str(error))
    except AnatomyNetError as error:
        return _health(Status.CRITICAL, str(error))
    measures = f"seconds={probe.seconds:.2f}s lowest_dsc={min(probe.dsc.values(), default=0):.2f};;{LOWEST_DSC:g}:;0;1"
    status = Status.OK if probe.passed else Status.CRITICAL
    return _health(status, f"{described}: {probe.verdict} | {measures}")


def _health(status: Status, text: str) -> Health:
    return Health(status, f"ANATOMYNET {status.name} - {' '.join(text.split())}")
