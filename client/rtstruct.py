"""Contours -> a DICOM RT Structure Set (PS3.3 A.19): the last step of the path.

Every point is placed by its own slice's ImagePositionPatient and the orientation that all slices share.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from anatomynet import __version__
from anatomynet.client.contours import Contour, StructureContours
from anatomynet.client.dicom_object import LONGEST_DESCRIPTION, copy_patient_and_study, remarks_on
from anatomynet.client.explicit_vr import encoded, put_encoded_sequences
from anatomynet.client.quiet import quiet_libraries
from anatomynet.client.structure_table import RoiStyle, StructureTable, load_structure_table
from anatomynet.client.study import CTSeries, CTSlice
from anatomynet.engine.errors import GeometryError, OutputError
from anatomynet.engine.findings import Finding
from anatomynet.engine.output import write_whole

# A point in 0.001 mm: "-1234.567" is 9 of the 16 bytes that a DS may have.
DECIMALS = 3
LABEL = "AnatomyNet"
DETACHED_STUDY_MANAGEMENT = "1.2.840.10008.3.1.2.3.1"  # retired, and what RT objects still refer to (PS3.3 C.8.8.5)


def write_rtstruct(
    path: Path,
    series: CTSeries,
    contours: Sequence[StructureContours],
    *,
    notes: Sequence[str] = (),
    findings: Sequence[Finding] = (),
    model_description: str = "",
    table: StructureTable | None = None,
    overwrite: bool = False,
) -> None:
    """Write what `trace_contours` found on a series as an RTSTRUCT, whole or not at all.

    Args:
        path: of the file.
        series: the CT that was segmented; patient, study and frame of reference are copied from it.
        contours: traced on a label map of that CT.
        notes: what was done on the way (LabelMap.notes); kept in every ROI's description.
        findings: what to look at; kept in the description of the ROI that each is about, or of every ROI where it has
            none, as a structure that was not found.
        model_description: name, version and hash of the model; kept in the structure set's description.
        table: names, labels, colours and types of the ROIs; the catalogue's without.
        overwrite: replace a file that is there.

    Raises:
        GeometryError: contours of another grid than the series'.
        OutputError: nothing was found to write; a file that is there, a full disk, no permission.
    """
    path = Path(path)
    if not contours:
        raise OutputError(f"no structure was found, so {path.name} was not written; expected at least one")
    for found in contours:
        _check_grid(found, series)
    dataset = _structure_set(series, model_description)
    styles = load_structure_table() if table is None else table
    for number, found in enumerate(contours, start=1):
        _add_roi(dataset, series, number=number, style=styles[found.structure.name])
        if remarks := remarks_on(found.structure, findings, notes, drawn=[each.structure for each in contours]):
            dataset.StructureSetROISequence[-1].ROIDescription = remarks
    buffer = BytesIO()
    with quiet_libraries():
        put_encoded_sequences(
            dataset,
            ReferencedFrameOfReferenceSequence=[_referenced_frame_of_reference(series)],
            ROIContourSequence=_roi_contours(series, contours, styles),
        )
        dataset.save_as(buffer, enforce_file_format=True)
    write_whole(path, buffer.getvalue(), overwrite=overwrite)


def _check_grid(found: StructureContours, series: CTSeries) -> None:
    ours, theirs = series.geometry, found.geometry
    if not ours.is_same_grid(theirs):
        raise GeometryError(
            f"contours of {found.structure.name} were traced on a grid of {theirs.shape} (z, y, x) at {theirs.origin}; "
            f"expected the series' own, {ours.shape} at {ours.origin}"
        )


def _structure_set(series: CTSeries, model_description: str) -> Dataset:
    """Everything but the structures and the images (PS3.3 C.7.1.1 to C.7.5.1, C.8.8.5)."""
    now = datetime.now()
    date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    dataset = _dataset(
        SOPClassUID=RTStructureSetStorage,
        SOPInstanceUID=generate_uid(),
        InstanceCreationDate=date,
        InstanceCreationTime=time,
        Modality="RTSTRUCT",
        SeriesInstanceUID=generate_uid(),
        SeriesNumber=1,
        SeriesDescription="AnatomyNet automatic contours",
        OperatorsName="",
        Manufacturer="AnatomyNet",
        ManufacturerModelName="AnatomyNet",
        SoftwareVersions=__version__,
        StructureSetLabel=LABEL,
        StructureSetDescription=model_description[:LONGEST_DESCRIPTION] or None,
        StructureSetDate=date,
        StructureSetTime=time,
        ApprovalStatus="UNAPPROVED",
        StructureSetROISequence=[],
        RTROIObservationsSequence=[],
    )
    copy_patient_and_study(series, dataset)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def _dataset(**values: Any) -> Dataset:
    """A dataset of these elements; None leaves one out."""
    dataset = Dataset()
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    return dataset


def _referenced_frame_of_reference(series: CTSeries) -> bytes:
    by_file: dict[str, list[CTSlice]] = {}
    for ct_slice in series.slices:
        by_file.setdefault(ct_slice.sop_instance_uid, []).append(ct_slice)
    images = [_referenced_image(*slices) for slices in by_file.values()]
    referenced_series = encoded(SeriesInstanceUID=series.series_instance_uid, ContourImageSequence=images)
    referenced_study = encoded(
        ReferencedSOPClassUID=DETACHED_STUDY_MANAGEMENT,
        ReferencedSOPInstanceUID=series.study_instance_uid,
        RTReferencedSeriesSequence=[referenced_series],
    )
    return encoded(FrameOfReferenceUID=series.frame_of_reference_uid, RTReferencedStudySequence=[referenced_study])


def _referenced_image(*slices: CTSlice) -> bytes:
    """One file of which these are slices, with the numbers of its frames unless they are all (PS3.3 table 10-3)."""
    image = slices[0]
    return encoded(
        ReferencedSOPClassUID=image.sop_class_uid,
        ReferencedSOPInstanceUID=image.sop_instance_uid,
        ReferencedFrameNumber=sorted(s.frame for s in slices) if len(slices) < image.frame_count else None,
    )


def _add_roi(dataset: Dataset, series: CTSeries, *, number: int, style: RoiStyle) -> None:
    """One structure: its name, and that it is an organ (PS3.3 C.8.8.5, C.8.8.8)."""
    dataset.StructureSetROISequence.append(
        _dataset(
            ROINumber=number,
            ReferencedFrameOfReferenceUID=series.frame_of_reference_uid,
            ROIName=style.name,
            ROIGenerationAlgorithm="AUTOMATIC",
        )
    )
    dataset.RTROIObservationsSequence.append(
        _dataset(
            ObservationNumber=number,
            ReferencedROINumber=number,
            ROIObservationLabel=style.label,
            RTROIInterpretedType=style.interpreted_type,
            ROIInterpreter="",
        )
    )


def _roi_contours(series: CTSeries, contours: Sequence[StructureContours], styles: StructureTable) -> list[bytes]:
    """The contours of each structure (PS3.3 C.8.8.6)."""
    drawn_on = {contour.slice_index for found in contours for contour in found.contours}
    # What the contours of one slice have in common, and begin with: their elements are written in this order.
    starts = {
        k: encoded(ContourImageSequence=[_referenced_image(series.slices[k])], ContourGeometricType="CLOSED_PLANAR")
        for k in drawn_on
    }
    return [
        encoded(
            ROIDisplayColor=styles[found.structure.name].colour,
            ReferencedROINumber=number,
            ContourSequence=_contour_items(series, found.contours, starts),
        )
        for number, found in enumerate(contours, start=1)
    ]


def _contour_items(series: CTSeries, contours: Sequence[Contour], starts: Mapping[int, bytes]) -> list[bytes]:
    texts = _point_texts(series, contours)
    return [
        starts[contour.slice_index]
        + encoded(NumberOfContourPoints=len(contour.points), ContourNumber=number, ContourData=text)
        for number, (contour, text) in enumerate(zip(contours, texts, strict=True), start=1)
    ]


def _point_texts(series: CTSeries, contours: Sequence[Contour]) -> list[str]:
    """The points of each contour as a ContourData: LPS mm, to DECIMALS."""
    # Few coordinates differ: points lie on the grid of half voxels.
    values, places = np.unique(_points_in_patient(series, contours).ravel(), return_inverse=True)
    texts = np.array([f"{value:.7g}" for value in values.tolist()], dtype=object)[places]
    ends = np.cumsum([3 * len(contour.points) for contour in contours])
    return ["\\".join(part.tolist()) for part in np.split(texts, ends[:-1])]


def _points_in_patient(series: CTSeries, contours: Sequence[Contour]) -> NDArray[np.float64]:
    """LPS mm (n, 3) of the points of all these contours, to DECIMALS."""
    along_x, along_y = (np.array(series.geometry.direction)[:, :2] * np.array(series.geometry.spacing[:2])).T
    points = np.concatenate([contour.points for contour in contours])
    positions = np.array([series.slices[contour.slice_index].position for contour in contours])
    in_plane = points[:, :1] * along_x + points[:, 1:] * along_y
    placed = in_plane + positions.repeat([len(contour.points) for contour in contours], axis=0)
    rounded: NDArray[np.float64] = placed.round(DECIMALS) + 0.0  # + 0.0: no "-0"
    return rounded
