"""Volumes on disk, NRRD and NIfTI -> an array (z, y, x) with its geometry, and back to NRRD. What data.py reads with.

What is returned lies along canonical axes: z to the head, y to the back, x to the patient's left.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.errors import DataError, GeometryError, OutputError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.output import write_whole
from anatomynet.engine.preprocess import canonical_from_array

SUFFIXES = (".nrrd", ".nii.gz", ".nii")
SPACES_LPS = ("left-posterior-superior", "LPS")  # as NRRD spells it
PHANTOM_KEY = "anatomynet phantom"  # in an NRRD header
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # NIfTI counts to the patient's right and front
# nibabel and gzip, on damaged files.
DAMAGED_NIFTI = (OSError, ValueError, EOFError, OverflowError, zlib.error)

Array = NDArray[Any]


def stem_of(path: Path) -> str:
    """The name without its suffix, of which .nii.gz is one."""
    return next((path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix)), path.stem)


def read_volume(path: Path) -> tuple[Array, VolumeGeometry]:
    """One volume (z, y, x) of whatever type the file has, and its geometry.

    Args:
        path: .nrrd, whose axes must run along left-posterior-superior; .nii or .nii.gz, in any orientation along the
            patient's axes.

    Raises:
        DataError: a file that cannot be read, not three axes, axes that are not the patient's, lengths in other units
            than mm, or voxels that are no real numbers.
    """
    return _read_nrrd(path) if path.suffix == ".nrrd" else _read_nifti(path)


def write_nrrd(path: Path, array: Array, geometry: VolumeGeometry, *, phantom: bool = False) -> None:
    """Writes an array (z, y, x) on a canonical grid, gzipped, whole or not at all; marked where it is of a phantom.

    Raises:
        OutputError: it could not be written, or pynrrd is not there.
    """
    import io

    try:
        import nrrd
    except ModuleNotFoundError as error:
        raise OutputError("NRRD needs pynrrd: pip install 'anatomynet[formats]'") from error

    header = {
        "space": SPACES_LPS[0],
        "space directions": np.diag(geometry.spacing),
        "space origin": np.array(geometry.origin),
        "encoding": "gzip",
    } | ({PHANTOM_KEY: "yes"} if phantom else {})
    buffer = io.BytesIO()
    nrrd.write(buffer, array, header, index_order="C", compression_level=1)
    write_whole(path, buffer.getvalue())


def is_phantom(path: Path) -> bool:
    """Whether a file that `read_volume` can read is marked as of a phantom; NIfTI has no such mark."""
    if path.suffix != ".nrrd":
        return False
    import nrrd

    return PHANTOM_KEY in nrrd.read_header(str(path))


def _read_nrrd(path: Path) -> tuple[Array, VolumeGeometry]:
    import nrrd

    try:
        array, header = nrrd.read(str(path), index_order="C")
        directions = np.asarray(header.get("space directions", np.nan), dtype=np.float64)
        origin_x, origin_y, origin_z = np.asarray(header.get("space origin", np.zeros(3)), dtype=np.float64).tolist()
    # pynrrd lets zlib's error through, KeyError for an unknown type, and StopIteration where the file is empty.
    except (OSError, nrrd.NRRDError, ValueError, KeyError, EOFError, StopIteration, zlib.error) as error:
        raise DataError(f"{path} is not a readable NRRD file: {error or type(error).__name__}") from error
    space, along_axes = header.get("space"), array.ndim == 3 and directions.shape == (3, 3)
    if (
        space not in SPACES_LPS
        or not along_axes
        or not (np.diag(directions) > 0).all()
        or not np.allclose(directions, np.diag(np.diag(directions)), atol=1e-6)
    ):
        raise DataError(
            f"{path}: expected three axes along {SPACES_LPS[0]}, found {array.ndim} in {space}, "
            f"space directions {directions.tolist()}"
        )
    _check_units(path, set(header.get("space units", ())))
    depth, height, width = array.shape
    x, y, z = np.diag(directions).tolist()
    try:
        return array, VolumeGeometry((depth, height, width), (x, y, z), (origin_x, origin_y, origin_z))
    except GeometryError as error:
        raise DataError(f"{path}: {error}") from error


def _check_units(path: Path, units: set[str]) -> None:
    """Of lengths, where a file names any."""
    other = sorted(units - {"mm", "unknown", ""})
    if other:
        raise DataError(f"{path}: expected lengths in mm, found {', '.join(other)}")


def _read_nifti(path: Path) -> tuple[Array, VolumeGeometry]:
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
        from nibabel.wrapstruct import WrapStructError
    except ImportError as error:
        raise DataError(f"{path}: NIfTI needs nibabel: pip install 'anatomynet[formats]'") from error
    try:
        image: Any = nibabel.Nifti1Image.from_filename(path)  # whose header's calls are not typed
        values, affine = np.asarray(image.dataobj), np.asarray(image.affine)
    except (ImageFileError, HeaderDataError, WrapStructError, *DAMAGED_NIFTI) as error:
        raise DataError(f"{path} is not a readable NIfTI file; write it again") from error
    if values.dtype.kind not in "buif":
        raise DataError(f"{path}: expected one real number a voxel, found {values.dtype}")
    _check_units(path, {image.header.get_xyzt_units()[0]})
    if values.ndim != 3 or not (image.header["sform_code"] or image.header["qform_code"]):
        raise DataError(f"{path}: expected three axes and an orientation (sform or qform), found {values.ndim} axes")
    _check_orientations(path, image.header, values.shape)
    try:
        geometry = _geometry_of(RAS_TO_LPS @ affine, values.shape)
        return canonical_from_array(values.transpose(2, 1, 0), geometry), geometry.canonical()
    except GeometryError as error:
        raise DataError(f"{path}: {error}") from error


def _check_orientations(path: Path, header: Any, sides: tuple[int, ...]) -> None:
    """A file may say twice where its voxels lie, and programs differ in which they believe."""
    if not (header["sform_code"] and header["qform_code"]):
        return
    corners = np.array([(*np.array(corner) * np.subtract(sides, 1), 1) for corner in np.ndindex(2, 2, 2)])
    try:
        sform, qform = np.asarray(header.get_sform()), np.asarray(header.get_qform())
    except ValueError as error:  # of a quaternion that turns nothing
        raise DataError(f"{path}: its qform is no orientation: {error}; write it again") from error
    apart = np.linalg.norm(corners @ (sform - qform).T, axis=1).max()  # nowhere more than at a corner
    if not apart <= np.linalg.norm(sform[:3, :3], axis=0).min():
        raise DataError(
            f"{path}: its sform and qform place voxels up to {apart:.3g} mm apart: expected one orientation; find out "
            "which is right, and write the file with it alone"
        )


def _geometry_of(affine: NDArray[np.float64], sides: tuple[int, ...]) -> VolumeGeometry:
    """Of index (i, j, k) -> LPS mm, the sides in the same order."""
    width, height, depth = sides
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    rows = [(float(a), float(b), float(c)) for a, b, c in affine[:3, :3] / np.array((x, y, z)).clip(min=1e-9)]
    origin_x, origin_y, origin_z = affine[:3, 3].tolist()
    direction = (rows[0], rows[1], rows[2])
    return VolumeGeometry((depth, height, width), (x, y, z), (origin_x, origin_y, origin_z), direction)
