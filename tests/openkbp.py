"""Real patients for tests: cases of OpenKBP, where the data lies beside the checkout, as DICOM studies."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from anatomynet.client.ct_writer import write_ct_series
from anatomynet.engine.data import Case, read_case
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.volume import CTVolume

OPENKBP = Path(__file__).resolve().parents[2] / "shared" / "data" / "openkbp"
REDUCTION = 4  # the data set's authors reduced 512 x 512 slices 4 x 4

requires_openkbp = pytest.mark.skipif(not OPENKBP.is_dir(), reason=f"no OpenKBP data at {OPENKBP}")


def validation_case(name: str, structures: tuple[str, ...]) -> Case:
    """One validation patient on the data set's own 128 x 128 grid."""
    return read_case(OPENKBP / "validation" / name, structures)


def full_size_volume(case: Case) -> CTVolume:
    """The case's CT with each voxel as 4 x 4 pixels of a 512 x 512 slice: their mean is the voxel again."""
    x, y, z = case.volume.geometry.spacing
    origin_x, origin_y, origin_z = case.volume.geometry.origin
    first_pixel = (1 - REDUCTION) / 2 / REDUCTION  # of a voxel, from its centre to that of its first pixel
    hu = np.ascontiguousarray(case.volume.hu.repeat(REDUCTION, axis=1).repeat(REDUCTION, axis=2))
    geometry = VolumeGeometry(
        (hu.shape[0], hu.shape[1], hu.shape[2]),
        (x / REDUCTION, y / REDUCTION, z),
        (origin_x + first_pixel * x, origin_y + first_pixel * y, origin_z),
    )
    return CTVolume(hu, geometry)


def write_study(folder: Path, case: Case) -> None:
    """The case as a DICOM CT study of 512 x 512 slices."""
    write_ct_series(folder, full_size_volume(case), seed=1)


def on_own_grid(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A 512 x 512 mask (z, y, x) on the case's 128 x 128 grid: where at least half of the 4 x 4 pixels are inside."""
    depth, height, width = mask.shape
    blocks = mask.reshape(depth, height // REDUCTION, REDUCTION, width // REDUCTION, REDUCTION)
    inside: NDArray[np.bool_] = blocks.mean(axis=(2, 4)) >= 0.5
    return inside
