"""Cases on disk -> cases in memory: the layouts, and what is annotated.

A case is a folder, of one of these layouts; whatever else lies in it is left alone.

case/img.nrrd     structures/BrainStem.nrrd      PDDCA / MICCAI 2015: a mask a structure
case/ct.nii.gz    structures/BrainStem.nii.gz    the same as NIfTI
case/ct.nii.gz    labels.nii.gz                  a label map; labels.toml, in the case or beside the cases, says which
                                                 value is what: Parotid_L = 3

A mask is named as the structure is, or as a department may call it (aliases.py). No file, or no voxel of a value in a
label map, means not annotated, never absent. DICOM studies become such folders by `anatomynet-client archive`, so that
training needs to know nothing of DICOM.
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
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import DataError
from anatomynet.engine.geometry import Index, VolumeGeometry
from anatomynet.engine.preprocess import body_box
from anatomynet.engine.resolution import block_means, reduced_labels
from anatomynet.engine.volume import CTVolume, LabelArray
from anatomynet.engine.volume_files import SUFFIXES, read_volume, stem_of

CT_NAMES = ("img.nrrd", "ct.nii.gz", "ct.nii")
LABEL_MAP_NAMES = ("labels.nii.gz", "labels.nii", "labels.nrrd")
LABEL_TABLE = "labels.toml"
# How far beyond the model's range a case's spacing may lie: the range holds the middle 90 % of the training cases.
SPACING_MARGIN = 1.5
SPACING_TOLERANCE = 0.01  # of a mask's, against the CT's
ORIGIN_TOLERANCE = 0.25  # of a mask's against the CT's, in voxels
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
        unmatched: names of masks that are none of the structures; they were not read.
        synthetic: a phantom, not a patient.
    """

    name: str
    volume: CTVolume
    labels: LabelArray
    annotated: tuple[bool, ...]
    unmatched: tuple[str, ...] = ()
    synthetic: bool = False


def find_cases(folder: Path) -> list[Path]:
    """The case folders in `folder`, by name.

    Raises:
        DataError: none there.
    """
    cases = sorted({path.parent for name in CT_NAMES for path in folder.glob(f"*/{name}")})
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
        DataError: a file that cannot be read, axes that are not the patient's, a mask of another grid, two masks of
            one structure, or no known structure.
        ModelError: an alias file that cannot be used.
    """
    path = next((folder / name for name in CT_NAMES if (folder / name).is_file()), None)
    if path is None:
        raise DataError(f"{folder}: no CT; expected one of {', '.join(CT_NAMES)}")
    hu, geometry = read_volume(path)
    if not np.isfinite(hu).all():
        raise DataError(f"{path}: expected finite Hounsfield units, found NaN or infinity")
    labels = np.zeros(hu.shape, np.uint8)
    annotated, unmatched = set(), []
    for name, mask in _masks(folder, structures, geometry, alias_file):
        if mask is None:
            unmatched.append(name)
            continue
        annotated.add(name)
        labels[mask] = structures.index(name) + 1
    if not annotated:
        found = f"; found {', '.join(unmatched)}" if unmatched else ""
        raise DataError(f"{folder}: none of {', '.join(structures)} in its structures/{found}")
    volume = CTVolume(np.clip(np.rint(hu), -32768, 32767).astype(np.int16), geometry)
    return Case(folder.name, volume, labels, tuple(name in annotated for name in structures), tuple(unmatched))


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

    The paper cut its 261 CTs by hand (section 2.1). Trunk and legs hold nothing to learn, and fill the memory.
    """
    spacing = case.volume.geometry.spacing[2]
    depth = case.labels.shape[0]
    drawn = np.flatnonzero(case.labels.any(axis=(1, 2)))
    if depth * spacing <= LONGEST_HEAD_AND_NECK_MM or not drawn.size:
        return case
    margin = math.ceil(HEAD_AND_NECK_MARGIN_MM / spacing)
    first, last = max(0, int(drawn[0]) - margin), min(depth, int(drawn[-1]) + 1 + margin)
    return _cropped(case, (first, 0, 0), (last, case.labels.shape[1], case.labels.shape[2]))


def cut_to_body(case: Case) -> Case:
    """The case without the air around the patient: the box that serving computes, at the network's resolution."""
    return _cropped(case, *body_box(case.volume.hu, in_plane_stride=1))


def _cropped(case: Case, start: Index, stop: Index) -> Case:
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
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
    label_map = next((folder / name for name in LABEL_MAP_NAMES if (folder / name).is_file()), None)
    if label_map is None:
        for path in sorted(p for p in (folder / "structures").glob("*") if p.name.endswith(SUFFIXES)):
            yield stem_of(path), partial(_read_mask, path, geometry)
        return
    labels = _read_on_grid(label_map, geometry)
    for name, value in _label_table(folder).items():
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
    return table


def _read_mask(path: Path, geometry: VolumeGeometry) -> Mask:
    mask: Mask = _read_on_grid(path, geometry) > 0
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
