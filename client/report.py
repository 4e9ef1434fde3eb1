"""What was done, with which model, in how long: the JSON report of a study. Nothing private."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from anatomynet.client.clock import StageClock
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.findings import Finding
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.output import write_whole
from anatomynet.engine.structure_region import StructureRegion
from anatomynet.engine.volume import LabelMap


def structure_volumes_ml(regions: Sequence[StructureRegion], geometry: VolumeGeometry) -> dict[str, float]:
    """TG-263 name -> millilitres; 0.0 where the structure was not found."""
    return {region.name: region.voxels * geometry.voxel_ml for region in regions}


def write_report(
    path: Path,
    label_map: LabelMap,
    clock: StageClock,
    *,
    model: ModelConfig,
    runtime: str,
    regions: Sequence[StructureRegion],
    findings: Sequence[Finding] = (),
    overwrite: bool = False,
) -> None:
    """Writes the JSON report of one segmented study.

    Args:
        path: the file.
        label_map: what was drawn.
        clock: the seconds of each stage.
        model: what drew it.
        runtime: the description of where it ran.
        regions: the label map's.
        findings: what deserves a look.
        overwrite: a file that is there may be replaced.

    Raises:
        OutputError: a file that exists, or cannot be written.
    """
    volumes = structure_volumes_ml(regions, label_map.geometry)
    confidence = label_map.confidence or (0.0,) * len(volumes)
    report = {
        "anatomynet_version": version("anatomynet"),
        "model": {"name": model.name, "checkpoint_sha256": model.checkpoint_sha256},
        "runtime": runtime,
        "shape_zyx": list(label_map.geometry.shape),
        "spacing_xyz_mm": list(label_map.geometry.spacing),
        "structures": [
            {"name": name, "volume_ml": round(ml, 2), "confidence": round(sure, 3)}
            for (name, ml), sure in zip(volumes.items(), confidence, strict=True)
        ],
        "computed_share": label_map.computed_share and round(label_map.computed_share, 3),
        "notes": list(label_map.notes),
        "findings": [{"structure": f.name, "text": f.text, "index_zyx": f.index} for f in findings],
        "seconds": {stage: round(seconds, 3) for stage, seconds in clock.seconds.items()},
    }
    write_whole(path, (json.dumps(report, indent=2) + "\n").encode(), overwrite=overwrite)
