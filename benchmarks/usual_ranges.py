"""What is usual in the training cases? Writes engine/configs/usual_ranges.toml: numbers, no patient.

    python -m benchmarks.usual_ranges OPENKBP/train

Of the scans: the extremes. Of metal around the structures: the 90th percentile, so that one patient in ten is named.
Of each structure's size: from the 5th to the 95th percentile, each end moved outwards by half: contours of several
institutions, some cut off where the release ends, vary more than anatomy, and a warning must be worth a look.
Structures that run out of the scan are judged by their mean cross-section. Cases in which a structure meets an end of
the scan do not count for it.
"""

import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from anatomynet.engine.config import load_config
from anatomynet.engine.data import Case, find_cases, read_case
from anatomynet.engine.findings import THROUGH_THE_NECK, metal_near
from anatomynet.engine.structure_region import regions_from_label_map
from anatomynet.engine.structures import STRUCTURES, structures_by_name
from anatomynet.engine.volume import LabelMap

PERCENTILES = (5, 95)
WIDENING = 1.5
METAL_PERCENTILE = 90
FEWEST_CASES = 30
AIR_HU = -900
TARGET = Path(__file__).resolve().parent.parent / "engine" / "configs" / "usual_ranges.toml"


def measure(case: Case, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Table -> name -> this case's value."""
    spacing_x, spacing_y, spacing_z = case.volume.geometry.spacing
    released = np.flatnonzero((case.volume.hu > AIR_HU).any(axis=(1, 2)))
    tables: dict[str, dict[str, float]] = {"volume_ml": {}, "cross_section_mm2": {}, "largest_ratio": {}}
    for label, (name, annotated) in enumerate(zip(names, case.annotated, strict=True), start=1):
        mask = case.labels == label
        slices = np.flatnonzero(mask.any(axis=(1, 2)))
        if not annotated or not slices.size:
            continue
        area = mask.sum() * spacing_x * spacing_y / len(slices)
        if name in THROUGH_THE_NECK:
            tables["cross_section_mm2"][name] = area
        elif released[0] < slices[0] and slices[-1] < released[-1]:
            tables["volume_ml"][name] = area * len(slices) * spacing_z / 1000
    volumes = tables["volume_ml"]
    for name, volume in volumes.items():
        partner = STRUCTURES[name].mirror
        if name.endswith("_L") and partner in volumes:
            tables["largest_ratio"][name] = max(volume / volumes[partner], volumes[partner] / volume)
    return tables


def scan_of(case: Case, in_plane_stride: int) -> dict[str, float]:
    """What `find_warnings` judges a scan by, in mm, of a CT that was averaged stride x stride in plane."""
    geometry = case.volume.geometry
    return {
        "voxels in plane": max(geometry.spacing[:2]) / in_plane_stride,
        "slice distance": geometry.spacing[2],
        "field of view": geometry.shape[2] * geometry.spacing[0],
        "length of the scan": geometry.shape[0] * geometry.spacing[2],
    }


def metal_ml(case: Case, names: tuple[str, ...]) -> float:
    """Metal around what is annotated."""
    label_map = LabelMap(case.labels, case.volume.geometry, structures_by_name(names))
    present = [region for region in regions_from_label_map(label_map) if region.voxels]
    return len(metal_near(case.volume, present)) * case.volume.geometry.voxel_ml


def main() -> None:
    """Reads every case in the folder given and writes the ranges."""
    config, _ = load_config("openkbp7")
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    scans: dict[str, list[float]] = defaultdict(list)
    metal: list[float] = []
    for folder in tqdm(find_cases(Path(sys.argv[1]))):
        case = read_case(folder, config.structures)
        metal.append(metal_ml(case, config.structures))
        for what, value in scan_of(case, config.in_plane_stride).items():
            scans[what].append(value)
        for table, measured in measure(case, config.structures).items():
            for name, value in measured.items():
                values[table][name].append(value)
    lines = ["# What is usual, written by benchmarks/usual_ranges.py.", ""]
    lines += [f"most_metal_ml = {np.percentile(metal, METAL_PERCENTILE):.1f}  # {len(metal)} cases", "", "[scan_mm]"]
    lines += [f'"{what}" = [{_floor(min(found)):g}, {_ceil(max(found)):g}]' for what, found in scans.items()]
    for table, by_name in values.items():
        lines += ["", f"[{table}]"]
        for name, found in by_name.items():
            if len(found) < FEWEST_CASES:
                continue
            low, high = np.percentile(found, PERCENTILES)
            usual = f"[{low / WIDENING:.3g}, {high * WIDENING:.3g}]"
            limit = f"{high * WIDENING:.2g}"
            lines.append(f"{name} = {limit if table == 'largest_ratio' else usual}  # {len(found)} cases")
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(TARGET.read_text(encoding="utf-8"))


def _floor(value: float) -> float:
    """To two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.floor(value / unit) * unit:.2g}")


def _ceil(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.2g}")


if __name__ == "__main__":
    main()
