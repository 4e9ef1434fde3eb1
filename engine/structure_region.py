"""StructureRegion: one structure's voxels, cut to their box. What findings.py looks at, and what the review page shows.

A label map gives every voxel to one structure; regions may overlap, as a physician's contours do.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.boxes import boxes_of
from anatomynet.engine.geometry import Index
from anatomynet.engine.runs import Runs, runs_of
from anatomynet.engine.structures import Structure
from anatomynet.engine.volume import LabelMap


@dataclass(frozen=True, eq=False)
class StructureRegion:
    """One structure on a volume's grid.

    Attributes:
        name: as shown to the user.
        colour: red, green, blue, 0 to 255.
        start: (z, y, x) of `box` on the volume's grid.
        box: bool (z, y, x), True inside; of no voxel where the structure is absent.
        structure: which of ours it is; None for any other ROI.
        confidence: mean top probability along its border; None where no network drew it.
        stray_ml: what the network drew apart from it and was left out.
    """

    name: str
    colour: tuple[int, int, int]
    start: Index
    box: NDArray[np.bool_]
    structure: Structure | None = None
    confidence: float | None = None
    stray_ml: float = 0.0

    @property
    def voxels(self) -> int:
        """How many lie inside."""
        return int(np.count_nonzero(self.box))

    @cached_property
    def runs(self) -> Runs:
        """Of `box`."""
        return runs_of(self.box)


def regions_from_label_map(label_map: LabelMap) -> tuple[StructureRegion, ...]:
    """Every structure of a label map, in its order; an absent one has a box of no voxel."""
    count = len(label_map.structures)
    confidence = label_map.confidence or (None,) * count
    strays = label_map.stray_ml or (0.0,) * count
    found = boxes_of(label_map.labels, count)
    regions = []
    rows = zip(label_map.structures, found, confidence, strays, strict=True)
    for label, (structure, box, sure, stray_ml) in enumerate(rows, start=1):
        place = box or (slice(0, 0),) * 3
        mask = label_map.labels[place] == label
        start = (int(place[0].start), int(place[1].start), int(place[2].start))
        regions.append(StructureRegion(structure.tg263_name, structure.colour, start, mask, structure, sure, stray_ml))
    return tuple(regions)


def middle_of(region: StructureRegion) -> Index | None:
    """The voxel (z, y, x) inside the region nearest to its centre of mass, in voxels; None where it has none."""
    inside = np.argwhere(region.box)
    if not len(inside):
        return None
    z, y, x = np.add(region.start, inside[np.argmin(((inside - inside.mean(axis=0)) ** 2).sum(axis=1))]).tolist()
    return (z, y, x)
