"""Small CT studies on disk, and judges of DICOM files that no one here wrote."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from anatomynet.client.ct_writer import write_ct_series
from anatomynet.client.study import CTSeries
from anatomynet.engine.geometry import Direction, VolumeGeometry
from anatomynet.engine.volume import CTVolume

SPACING = (0.9765625, 1.171875, 2.5)
ORIGIN = (-100.3, 45.123, -312.7)
# Rows and columns of the four usual positions on the couch, and slices that stand coronal and sagittal.
DIRECTIONS: dict[str, Direction] = {
    "HFS": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "HFP": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "FFS": ((-1, 0, 0), (0, 1, 0), (0, 0, -1)),
    "FFP": ((1, 0, 0), (0, -1, 0), (0, 0, -1)),
    "coronal": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "sagittal": ((0, 0, -1), (1, 0, 0), (0, -1, 0)),
}
Mask = NDArray[np.bool_]
Scalar = TypeVar("Scalar", bound=np.generic)
# No word of these may ever appear in a message.
PATIENT = {"PatientName": "Meier^Secret", "PatientID": "PID4711", "PatientBirthDate": "19610102"}


def all_directions() -> list[Direction]:
    """The 48 ways in which a grid can lie along the patient's axes; half of them are left-handed."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            columns = np.zeros((3, 3))
            columns[list(order), range(3)] = signs
            (a, b, c), (d, e, f), (g, h, i) = columns.tolist()
            found.append(((a, b, c), (d, e, f), (g, h, i)))
    return found


def random_volume(shape: tuple[int, int, int] = (6, 8, 10), direction: Direction = DIRECTIONS["HFS"]) -> CTVolume:
    """Every voxel its own HU, the int16 range's ends among them."""
    hu = np.random.default_rng(1808).integers(-1024, 3072, shape, dtype=np.int16)
    hu[0, 0, 0], hu[-1, -1, -1] = -32768, 32767
    return CTVolume(hu, VolumeGeometry(shape, SPACING, ORIGIN, direction))


def write_study(folder: Path, volume: CTVolume | None = None, **changes: Any) -> list[Path]:
    """A study of one patient, some elements of every slice changed; its files from the feet up."""
    write_ct_series(folder, volume or random_volume())
    paths = sorted(folder.iterdir())
    for path in paths:
        edit(path, **{**PATIENT, **changes})
    return paths


def edit(path: Path, **changes: Any) -> None:
    """Change elements of a file; None deletes one."""
    dataset = pydicom.dcmread(path)
    change(dataset, **changes)
    dataset.save_as(path)


def change(dataset: Dataset, **changes: Any) -> None:
    """Change elements; None deletes one."""
    for keyword, value in changes.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
        if keyword == "SOPClassUID" and value:
            dataset.file_meta.MediaStorageSOPClassUID = value


def complaints(judge: str, *paths: Path) -> list[str]:
    """Lines of errors and warnings of dciodvfy (one file) or dcentvfy (several that belong together)."""
    if shutil.which(judge) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{judge} is not installed: apt install dicom3tools")
    result = subprocess.run([judge, *map(str, paths)], capture_output=True, text=True, check=False)
    return [line for line in result.stderr.splitlines() if line.startswith(("Error", "Warning", "(0x"))]


def errors_of_judges(series: CTSeries, *results: Path) -> list[str]:
    """What dciodvfy calls an error in each of a series' results, and dcentvfy in all of them together with the CT."""
    found = [f"{path.name}: {line}" for path in results for line in complaints("dciodvfy", path)]
    found += complaints("dcentvfy", *results, *dict.fromkeys(s.path for s in series.slices))
    return [line for line in found if "Error" in line]


def masks_by_plastimatch(rtstruct: Path, study: Path, folder: Path) -> dict[str, tuple[Mask, VolumeGeometry]]:
    """ROI name -> mask (z, y, x) as plastimatch draws it, and the grid it draws on."""
    import SimpleITK  # its calls are not typed

    plastimatch = Path(sys.executable).with_name("plastimatch")
    command = [plastimatch, "convert", "--input", rtstruct, "--referenced-ct", study, "--output-prefix", folder]
    subprocess.run([*map(str, command), "--prefix-format", "nii.gz"], check=True, capture_output=True)
    masks = {}
    for path in folder.glob("*.nii.gz"):
        image: Any = SimpleITK.ReadImage(str(path))
        mask = SimpleITK.GetArrayFromImage(image) > 0
        width, height, depth = image.GetSize()
        a, b, c, d, e, f, g, h, i = image.GetDirection()
        direction = ((a, b, c), (d, e, f), (g, h, i))
        geometry = VolumeGeometry((depth, height, width), image.GetSpacing(), image.GetOrigin(), direction)
        masks[path.name.removesuffix(".nii.gz")] = (mask, geometry)
    return masks


def on_grid(values: NDArray[Scalar], geometry: VolumeGeometry, wanted: VolumeGeometry) -> NDArray[Scalar]:
    """An array's values at another grid's voxel centres, which must be its own."""
    z, y, x = np.indices(wanted.shape)
    indices = geometry.indices_from_points(wanted.points_from_indices(np.stack([x, y, z], axis=-1)))
    nearest = np.rint(indices).astype(int)
    assert np.abs(indices - nearest).max() < 1e-2
    found: NDArray[Scalar] = values[nearest[..., 2], nearest[..., 1], nearest[..., 0]]
    return found


def words_of_patient() -> Iterable[str]:
    """What a message must not hold."""
    return ("Meier", "Secret", "PID4711", "19610102")
