"""LabelMap -> a DICOM Segmentation (PS3.3 A.51), one binary segment a structure, beside the RTSTRUCT."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from anatomynet import __version__
from anatomynet.client.dicom_object import TYPE_2_KEYWORDS, copy_patient_and_study, remarks_on
from anatomynet.client.header_elements import PATIENT_AND_STUDY_KEYWORDS
from anatomynet.client.quiet import quiet_libraries
from anatomynet.client.structure_table import RoiStyle, StructureTable, load_structure_table
from anatomynet.client.study import CTSeries
from anatomynet.engine.errors import GeometryError, OutputError
from anatomynet.engine.findings import Finding
from anatomynet.engine.output import write_whole
from anatomynet.engine.structures import Structure
from anatomynet.engine.volume import LabelMap

# SNOMED CT, as PS3.16 writes it; the side is a modifier of its own.
ANATOMY: dict[str, tuple[str, str]] = {
    "BrainStem": ("15926001", "Brainstem"),
    "Chiasm": ("244453006", "Optic chiasm"),
    "Esophagus": ("32849002", "Esophagus"),
    "Larynx": ("4596009", "Larynx"),
    "Mandible": ("91609006", "Mandible"),
    "OpticNerve": ("18234004", "Optic nerve"),
    "Parotid": ("45289007", "Parotid gland"),
    "SpinalCord": ("2748008", "Spinal cord"),
    "Submandibular": ("54019009", "Submandibular gland"),
}
SIDES = {"_L": ("7771000", "Left"), "_R": ("24028007", "Right")}


def seg_library() -> ModuleType:
    """Highdicom.

    Raises:
        OutputError: it is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        raise OutputError("SEG needs highdicom: pip install 'anatomynet[formats]'") from error
    return highdicom


def write_seg(
    path: Path,
    series: CTSeries,
    label_map: LabelMap,
    *,
    findings: Sequence[Finding] = (),
    model_description: str = "",
    table: StructureTable | None = None,
    overwrite: bool = False,
) -> None:
    """Write what was found on a series as a DICOM SEG with ReferencedSeriesSequence, whole or not at all.

    Segments are numbered 1, 2, ... in the label map's order; a structure that was not found has none.

    Args:
        path: of the file.
        series: the CT that was segmented; patient, study and frame of reference are copied from it.
        label_map: on that CT's own grid.
        findings: what to look at; kept in the description of the segment that each is about, or of every segment where
            it has none, as a structure that was not found.
        model_description: name, version and hash of the model; kept as the parameters of each segment's algorithm.
        table: names and colours; the catalogue's without.
        overwrite: replace a file that is there.

    Raises:
        GeometryError: a label map of another grid than the series'.
        OutputError: highdicom is missing; nothing was found to write; an enhanced CT in several files; a file that is
            there, a full disk.
    """
    highdicom = seg_library()
    if not label_map.geometry.is_same_grid(series.geometry):
        raise GeometryError(f"expected a label map on the series' own grid, {series.geometry.shape} (z, y, x)")
    structures, labels = _found(label_map)
    if not structures:
        raise OutputError(f"no structure was found, so {path.name} was not written; expected at least one")
    styles = load_structure_table() if table is None else table
    segments = _segments(highdicom, structures, styles, model_description)
    for segment, structure in zip(segments, structures, strict=True):
        if remarks := remarks_on(structure, findings, label_map.notes, drawn=structures):
            segment.SegmentDescription = remarks
    buffer = BytesIO()
    with quiet_libraries():
        segmentation = highdicom.seg.Segmentation(
            **_source(highdicom, series, labels),
            segmentation_type="BINARY",
            segment_descriptions=segments,
            series_instance_uid=generate_uid(),
            series_number=2,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="AnatomyNet",
            manufacturer_model_name="AnatomyNet",
            software_versions=__version__,
            device_serial_number="0",
            content_label="ANATOMYNET",
            content_description="AnatomyNet automatic contours",
        )
        segmentation.SeriesDescription = "AnatomyNet automatic segments"
        copy_patient_and_study(series, segmentation)
        segmentation.save_as(buffer, enforce_file_format=True)
    write_whole(path, buffer.getvalue(), overwrite=overwrite)


def _found(label_map: LabelMap) -> tuple[list[Structure], NDArray[np.uint8]]:
    """The structures that have voxels, and the labels (z, y, x) counted anew: 1, 2, ... are those."""
    present = np.flatnonzero(np.bincount(label_map.labels.ravel(), minlength=len(label_map.structures) + 1)[1:])
    numbers = np.zeros(len(label_map.structures) + 1, np.uint8)
    numbers[present + 1] = np.arange(1, present.size + 1)
    return [label_map.structures[p] for p in present], numbers[label_map.labels]


def _source(highdicom: Any, series: CTSeries, labels: NDArray[np.uint8]) -> dict[str, Any]:
    """The images that were segmented, and their labels in the same order: of a file of frames, its own."""
    paths = list(dict.fromkeys(s.path for s in series.slices))
    images = [_without_patient(pydicom.dcmread(path, stop_before_pixels=True)) for path in paths]
    first = series.slices[0]
    if not first.frame:
        return {"source_images": images, "pixel_array": labels}
    if len(images) > 1:
        raise OutputError(
            f"SEG cannot refer to an enhanced CT in {len(images)} files: ask for --output-type rtstruct or nifti"
        )
    planes = np.zeros((first.frame_count, *labels.shape[1:]), np.uint8)
    planes[[s.frame - 1 for s in series.slices]] = labels
    # highdicom looks among what all frames share, even where each says it for itself.
    shared = images[0].get("SharedFunctionalGroupsSequence") or [Dataset()]
    column_spacing, row_spacing, slice_spacing = series.geometry.spacing
    cosines = np.array(series.geometry.direction)[:, :2].T.ravel().tolist()
    shared[0].PlaneOrientationSequence = highdicom.PlaneOrientationSequence("PATIENT", cosines)
    shared[0].PixelMeasuresSequence = highdicom.PixelMeasuresSequence((row_spacing, column_spacing), slice_spacing)
    images[0].SharedFunctionalGroupsSequence = shared
    return {"source_images": images, "pixel_array": planes}


def _without_patient(image: Dataset) -> Dataset:
    """An image that names nobody: highdicom logs a name that it finds odd, and fails on a date that is none."""
    for tag in tuple(image.group_dataset(0x0010).keys()):
        del image[tag]
    for keyword in (*PATIENT_AND_STUDY_KEYWORDS, *TYPE_2_KEYWORDS):
        if keyword in image and not keyword.endswith("UID"):
            del image[keyword]
    for keyword in TYPE_2_KEYWORDS:
        setattr(image, keyword, "^" if keyword == "PatientName" else "")
    return image


def _segments(
    highdicom: Any, structures: Sequence[Structure], styles: StructureTable, model_description: str
) -> list[Dataset]:
    """Their descriptions, numbered 1, 2, ..., each with the algorithm that drew it."""
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="AnatomyNet",
        family=codes.DCM.ArtificialIntelligence,
        version=__version__,
        parameters={"model": model_description} if model_description else None,
    )
    return [_segment(highdicom, n, s, styles[s.name], algorithm) for n, s in enumerate(structures, start=1)]


def _segment(highdicom: Any, number: int, structure: Structure, style: RoiStyle, algorithm: Any) -> Dataset:
    """One segment's description (PS3.3 C.8.20.4)."""
    from pydicom.sr.codedict import codes  # 0.07 s, which an RTSTRUCT alone need not wait for

    side = SIDES.get(structure.name[-2:])
    value, meaning = ANATOMY[structure.name[:-2] if side else structure.name]
    segment: Dataset = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=style.name,
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=highdicom.sr.CodedConcept(value, "SCT", meaning),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
        display_color=highdicom.color.CIELabColor.from_rgb(*style.colour),
    )
    if side:
        modifier = highdicom.sr.CodedConcept(side[0], "SCT", side[1])
        segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return segment
