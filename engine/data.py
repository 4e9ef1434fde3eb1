"""Cases on disk -> cases in memory: the layouts, and what is annotated.

A case is a folder, of one of these layouts; whatever else lies in it is left alone.

case/img.nrrd     structures/BrainStem.nrrd      PDDCA / MICCAI 2015: a mask a structure
case/ct.nii.gz    structures/BrainStem.nii.gz    the same as NIfTI
case/ct.nii.gz    labels.nii.gz                  a label map; labels.toml, in the case or beside the cases, says which
                                                 value is what: Parotid_L = 3

A mask is named as the structure is, or as a department may call it (aliases.py). No file, or no voxel in a mask or of a
value in a label map, means not annotated, never absent. DICOM studies become such folders by `anatomynet-client
archive`, so that training needs to know nothing of DICOM.
"""

import math
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.aliases import load_aliases, structure_from_roi_name
from anatomynet.engine.boxes import slices_of
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import DataError
from anatomynet.engine.geometry import Index, VolumeGeometry
from anatomynet.engine.postprocess import drop_strays
from anatomynet.engine.preprocess import body_box
from anatomynet.engine.resolution import block_means, reduced_labels
from anatomynet.engine.volume import CTVolume, LabelArray
from anatomynet.engine.volume_files import SUFFIXES, is_phantom, read_volume, stem_of

CT_NAMES = ("img.nrrd", "ct.nii.gz", "ct.nii")
LABEL_MAP_NAMES = ("labels.nii.gz", "labels.nii", "labels.nrrd")
LABEL_TABLE = "labels.toml"
NOT_HIDDEN = "[!.]*"  # what was not written to its end is hidden, and what macOS leaves beside files
# How far beyond the model's range a case's spacing may lie: the range holds the middle 90 % of the training cases.
SPACING_MARGIN = 1.5
SPACING_TOLERANCE = 0.01  # of a mask's, against the CT's
ORIGIN_TOLERANCE = 0.25  # of a mask's against the CT's, in voxels
# Of a structure's voxels that are another's too, from which it is told: OpenKBP's brain stems and cords share 8 %.
SHARED_VOXELS = 0.2
VALUES_TOLD = 4  # of a mask that has several
# A scan of the head and neck alone is shorter; the longest of OpenKBP's 203 is 384 mm.
LONGEST_HEAD_AND_NECK_MM = 450.0
# What is kept above and below the contours of a longer one: from the brain stem to the vertex, or to the clavicles.
HEAD_AND_NECK_MARGIN_MM = 150.0


@dataclass(frozen=True, eq=False)
class Case:
    """One annotated CT.

    Attributes:
        name: of its folder.
        volume: the CT.
        labels: uint8 (z, y, x) on the CT's grid, i + 1 for structure i; 0 where nothing that is known.
        annotated: for each structure, whether its contours exist.
        unmatched: names of masks that are none of the structures, of other files beside them, and values of a label map
            that no table names; they were not read.
        remarks: what was decided on the way that deserves a look, one line each.
        synthetic: a phantom, not a patient.
    """

    name: str
    volume: CTVolume
    labels: LabelArray
    annotated: tuple[bool, ...]
    unmatched: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    synthetic: bool = False


def find_cases(folder: Path) -> list[Path]:
    """The case folders in `folder`, by name; also those with masks whose CT is missing, so that they are named.

    Raises:
        DataError: none there.
    """
    names = (*CT_NAMES, *LABEL_MAP_NAMES, "structures")
    cases = sorted({path.parent for name in names for path in folder.glob(f"{NOT_HIDDEN}/{name}")})
    if not cases:
        raise DataError(
            f"no case in {folder}: expected folders with img.nrrd and structures/*.nrrd (the PDDCA layout), "
            "or ct.nii.gz and structures/*.nii.gz; DICOM studies become such by anatomynet-client archive"
        )
    return cases


def read_case(folder: Path, structures: tuple[str, ...], *, alias_file: Path | None = None) -> Case:
    """Reads one case of any layout, on its own grid.

    Args:
        folder: of the case.
        structures: names; label i is structures[i - 1].
        alias_file: a department's names for them, see `load_aliases`.

    Raises:
        DataError: a file that cannot be read, axes that are not the patient's, two CTs, a mask of another grid or of
            several values, two masks of one structure or of the same voxels, or no known structure.
        ModelError: an alias file that cannot be used.
    """
    path = _ct_of(folder)
    hu, geometry = read_volume(path)
    if not np.isfinite(hu).all():
        raise DataError(f"{path}: expected finite Hounsfield units, found NaN or infinity")
    labels = np.zeros(hu.shape, np.uint8)
    unmatched, empty, drawn = [], [], dict[str, int]()
    for name, mask in _masks(folder, structures, geometry, alias_file):
        if mask is None:
            unmatched.append(name)
        elif not mask.any():
            empty.append(name)
        else:
            drawn[name] = np.count_nonzero(mask)
            labels[mask] = structures.index(name) + 1
    if not drawn:
        found = f"; empty: {', '.join(empty)}" if empty else ""
        found += f"; found {', '.join(unmatched)}" if unmatched else ""
        raise DataError(f"{folder}: none of {', '.join(structures)} in its structures/{found}")
    remarks = [f"{name}: its mask is empty, so it is not annotated" for name in empty]
    remarks += _shared_voxels(folder, labels, {structures.index(name) + 1: (name, n) for name, n in drawn.items()})
    if hu.dtype != np.int16:
        hu = np.clip(np.rint(hu), -32768, 32767)
    volume = CTVolume(hu.astype(np.int16), geometry)
    annotated = tuple(name in drawn for name in structures)
    return Case(folder.name, volume, labels, annotated, tuple(unmatched), tuple(remarks), synthetic=is_phantom(path))


def _ct_of(folder: Path) -> Path:
    paths = [folder / name for name in CT_NAMES if (folder / name).is_file()]
    if not paths:
        raise DataError(f"{folder}: no CT; expected one of {', '.join(CT_NAMES)}")
    if len(paths) > 1:
        raise DataError(f"{folder}: {' and '.join(path.name for path in paths)}: expected one CT; remove the others")
    return paths[0]


def _shared_voxels(folder: Path, labels: LabelArray, drawn: dict[int, tuple[str, int]]) -> Iterator[str]:
    """Of structures, label -> name and voxels as drawn, those of which later ones have taken much."""
    for label, (name, voxels) in drawn.items():
        left = np.count_nonzero(labels == label)
        if not left:
            raise DataError(
                f"{folder}: {name}: every voxel of it is drawn as another structure too; expected contours of its own"
            )
        shared = 1 - left / voxels
        if shared > SHARED_VOXELS:
            yield f"{name}: {shared:.0%} of it is drawn as another structure too, and counts as that"


def at_network_resolution(case: Case, model: ModelConfig) -> Case:
    """The case as the network sees it: a CT at full resolution is averaged in plane, as the served graph does it.

    HU become the mean of stride x stride voxels, padded at the far end with air; a mask keeps a voxel where at least
    half of its block is inside. OpenKBP comes reduced already: a case's in-plane spacing tells (x, y), against the
    model's trained range for full resolution and stride x that range for the network's.

    Raises:
        DataError: a spacing near neither range.
    """
    stride = model.in_plane_stride
    if _spacing_fits(case, model, stride):
        return case
    if not _spacing_fits(case, model, 1):
        x, y, _ = case.volume.geometry.spacing
        low, high = model.smallest_spacing[0], model.largest_spacing[0]
        reduced = f", or {low * stride:.3g} to {high * stride:.3g} mm reduced {stride} x {stride}" if stride > 1 else ""
        raise DataError(
            f"{case.name}: {x:.3g} x {y:.3g} mm in plane; expected about {low:.3g} to {high:.3g} mm for "
            f"{model.name}{reduced}"
        )
    return _averaged_in_plane(case, model)


def _spacing_fits(case: Case, model: ModelConfig, factor: int) -> bool:
    """Whether a case's voxels in plane are those of the trained range times a factor, give or take the margin."""
    stride, spread = model.in_plane_stride, max(np.divide(model.largest_spacing, model.smallest_spacing)[:2])
    # Of a small stride, the ranges would overlap: then the margin ends half way between them.
    margin = min(SPACING_MARGIN, max(1.0, math.sqrt(stride / spread))) if stride > 1 else SPACING_MARGIN
    ranges = zip(case.volume.geometry.spacing[:2], model.smallest_spacing, model.largest_spacing, strict=False)
    return all(low * factor / margin <= own <= high * factor * margin for own, low, high in ranges)


def _averaged_in_plane(case: Case, model: ModelConfig) -> Case:
    stride, geometry = model.in_plane_stride, case.volume.geometry
    depth, height, width = geometry.shape
    pad = ((0, 0), (0, -height % stride), (0, -width % stride))
    air = math.floor(model.hu_window[0])  # what the served graph pads with
    hu = block_means(np.pad(case.volume.hu, pad, constant_values=air), stride)
    labels = reduced_labels(np.pad(case.labels, pad), stride, count=len(case.annotated))
    x, y, z = geometry.spacing
    middle = (stride - 1) / 2
    origin_x, origin_y, origin_z = geometry.points_from_indices((middle, middle, 0)).tolist()
    shape = (depth, hu.shape[1], hu.shape[2])
    coarse = VolumeGeometry(shape, (x * stride, y * stride, z), (origin_x, origin_y, origin_z), geometry.direction)
    return replace(case, volume=CTVolume(np.rint(hu).astype(np.int16), coarse), labels=labels)


def cut_to_head_and_neck(case: Case) -> Case:
    """The slices around the contours where a scan is longer than head and neck; any other case as it is.

    A stray piece of a structure, at the feet perhaps, keeps no slice. The paper cut its 261 CTs by hand (section 2.1).
    Trunk and legs hold nothing to learn, and fill the memory.
    """
    spacing = case.volume.geometry.spacing[2]
    depth = case.labels.shape[0]
    if depth * spacing <= LONGEST_HEAD_AND_NECK_MM:
        return case
    drawn = np.flatnonzero(drop_strays(case.labels).any(axis=(1, 2)))
    if not drawn.size:
        return case
    margin = math.ceil(HEAD_AND_NECK_MARGIN_MM / spacing)
    first, last = max(0, int(drawn[0]) - margin), min(depth, int(drawn[-1]) + 1 + margin)
    return _cropped(case, (first, 0, 0), (last, case.labels.shape[1], case.labels.shape[2]))


def cut_to_body(case: Case) -> Case:
    """The case without the air around the patient: the box that serving computes, at the network's resolution."""
    return _cropped(case, *body_box(case.volume.hu, in_plane_stride=1))


def _cropped(case: Case, start: Index, stop: Index) -> Case:
    box = slices_of(start, stop)
    volume = CTVolume(np.ascontiguousarray(case.volume.hu[box]), case.volume.geometry.cropped(start, stop))
    return replace(case, volume=volume, labels=np.ascontiguousarray(case.labels[box]))


Mask = NDArray[np.bool_]


def _masks(
    folder: Path, structures: tuple[str, ...], geometry: VolumeGeometry, alias_file: Path | None
) -> Iterator[tuple[str, Mask | None]]:
    """A case's masks by structure; by its own name, and without a mask, what is none of the structures."""
    aliases = load_aliases(alias_file)
    seen: dict[str, str] = {}
    for own_name, read_mask in _sources(folder, geometry):
        structure = structure_from_roi_name(own_name, aliases)
        if structure is None or structure.name not in structures:
            yield own_name, None
        elif structure.name in seen:
            raise DataError(
                f"{folder}: {seen[structure.name]} and {own_name} are both {structure.name}; expected one mask"
            )
        else:
            seen[structure.name] = own_name
            yield structure.name, read_mask()


def _sources(folder: Path, geometry: VolumeGeometry) -> Iterator[tuple[str, Callable[[], Mask]]]:
    """What a case calls each of its masks, and what reads it."""
    beside = sorted((folder / "structures").glob(NOT_HIDDEN))
    paths = [path for path in beside if path.name.endswith(SUFFIXES)]
    label_map = next((folder / name for name in LABEL_MAP_NAMES if (folder / name).is_file()), None)
    if label_map is None:
        for path in beside:
            # With its suffix, what cannot be read is none of the structures.
            yield stem_of(path) if path in paths else path.name, partial(_read_mask, path, geometry)
        return
    if paths:
        raise DataError(f"{folder}: {label_map.name} and structures/: expected one of them; remove the other")
    labels = _read_on_grid(label_map, geometry)
    if not np.array_equal(labels, np.rint(labels)):
        raise DataError(f"{label_map}: expected whole numbers, a structure each, found fractions")
    table = _label_table(folder)
    for value in np.setdiff1d(labels, (0, *table.values())):
        yield f"value {value:g}", partial(np.equal, labels, value)
    for name, value in table.items():
        mask = labels == value
        if mask.any():
            yield name, partial(np.asarray, mask)


def _label_table(case: Path) -> dict[str, int]:
    """Name -> value, of the case's own table or of the one beside the cases."""
    path = next((p for p in (case / LABEL_TABLE, case.parent / LABEL_TABLE) if p.is_file()), None)
    if path is None:
        raise DataError(f"{case}: a label map without {LABEL_TABLE}; expected one here or in {case.parent}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path} is not TOML: {error}") from error
    if any(type(value) is not int or value < 1 for value in table.values()):
        raise DataError(f"{path}: expected NAME = VALUE with whole numbers above 0, found {table}")
    if len(set(table.values())) < len(table):
        raise DataError(f"{path}: expected names with a value each its own, found {table}")
    return table


def _read_mask(path: Path, geometry: VolumeGeometry) -> Mask:
    """A mask of 0 outside and one number inside, whichever."""
    array = _read_on_grid(path, geometry)
    inside = array.max()
    mask: Mask = array > 0
    if not np.array_equal(array, mask * inside):
        found = ", ".join(f"{value:.4g}" for value in np.unique(array)[:VALUES_TOLD])
        raise DataError(f"{path}: expected a mask, 0 outside and one value inside, found {found}")
    return mask


def _read_on_grid(path: Path, geometry: VolumeGeometry) -> NDArray[Any]:
    """A mask or label map whose voxels are the CT's."""
    array, own = read_volume(path)
    if own.shape != geometry.shape:
        raise DataError(f"{path}: expected the CT's shape {geometry.shape} (z, y, x), found {own.shape}")
    if not np.allclose(own.spacing, geometry.spacing, rtol=SPACING_TOLERANCE):
        raise DataError(f"{path}: expected the CT's spacing {geometry.spacing} mm, found {own.spacing}")
    if (np.abs(geometry.indices_from_points(own.origin)) > ORIGIN_TOLERANCE).any():
        raise DataError(f"{path}: expected the CT's origin {geometry.origin} mm, found {own.origin}: it lies elsewhere")
    if not np.isfinite(array).all():
        raise DataError(f"{path}: expected 0 outside and whole numbers inside, found NaN or infinity")
    return array
