"""The RTSTRUCT: dciodvfy finds nothing wrong, and plastimatch draws the label map again."""

import re
import resource
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from scipy import ndimage

from anatomynet.client.contours import Contour, StructureContours, trace_contours
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.study import CTSeries, read_ct_series
from anatomynet.engine.errors import GeometryError, OutputError
from anatomynet.engine.findings import Finding
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.structures import STRUCTURES
from anatomynet.engine.volume import LabelMap
from tests.dicom_studies import (
    DIRECTIONS,
    PATIENT,
    complaints,
    edit,
    masks_by_plastimatch,
    on_grid,
    random_volume,
    write_study,
)

STRUCTURE_NAMES = ("BrainStem", "Mandible", "OpticNerve_L", "Parotid_R", "Chiasm", "SpinalCord")
CATALOGUE = tuple(STRUCTURES[name] for name in STRUCTURE_NAMES)
SHAPE = (11, 40, 44)
LONGEST_DS = 16
LONGEST_SH = 16
# Points are written to 0.001 mm.
POINT_TOLERANCE_MM = 0.0006

Labels = NDArray[np.uint8]


def hard_labels(shape: tuple[int, int, int] = SHAPE) -> Labels:
    """Every shape that has gone wrong somewhere: one label each."""
    labels = np.zeros(shape, np.uint8)
    labels[2:6, 5:15, 5:15], labels[3:5, 8:12, 8:12], labels[3, 9:11, 9:11] = 1, 0, 1  # a hole, an island in it
    labels[1:5, 0:4, 0:6], labels[:, -1, -3:], labels[0, 20:, 0] = 2, 2, 2  # at the border of the image
    labels[4, 18, 3:12], labels[5, 3:12, 18], labels[6, 20, 20] = 3, 3, 3  # one voxel thick
    labels[2:6, 17:20, 14:17], labels[2:6, 17:20, 19:22] = 4, 4  # two islands in a slice
    labels[7, np.arange(2, 9), np.arange(20, 13, -1)] = 5  # voxels that touch by their corners, both ways
    labels[8, np.arange(2, 9), np.arange(20, 27)] = 5
    blob = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=(7, 18, 18)), 1.5)
    box = labels[3:10, 22:40, 24:42]
    box[(blob > np.median(blob)) & (box == 0)] = 6  # ragged, with holes, over 500 voxels
    return labels


def traced(series: CTSeries, labels: Labels) -> tuple[StructureContours, ...]:
    return trace_contours(LabelMap(labels, series.geometry, CATALOGUE))


@pytest.fixture
def series(tmp_path: Path) -> CTSeries:
    write_study(tmp_path / "study", random_volume(SHAPE))
    return read_ct_series(tmp_path / "study")


def written(path: Path, series: CTSeries, labels: Labels, model_description: str = "") -> Dataset:
    write_rtstruct(path, series, traced(series, labels), model_description=model_description)
    return pydicom.dcmread(path)


def comparable(dataset: Dataset) -> Dataset:
    """A file without the identifiers and times that differ each time."""
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "InstanceCreationDate", "InstanceCreationTime"):
        del dataset[keyword]
    del dataset.StructureSetDate, dataset.StructureSetTime
    return dataset


@pytest.mark.parametrize("position", DIRECTIONS)
def test_plastimatch_draws_the_label_map_again(tmp_path: Path, position: str) -> None:
    study = tmp_path / "study"
    write_study(study, random_volume(SHAPE, DIRECTIONS[position]))
    series = read_ct_series(study)
    labels = hard_labels()
    write_rtstruct(tmp_path / "rs.dcm", series, traced(series, labels))
    masks = masks_by_plastimatch(tmp_path / "rs.dcm", study, tmp_path / "masks")
    assert set(masks) == {s.tg263_name for s in CATALOGUE}
    for label, structure in enumerate(CATALOGUE, start=1):
        drawn = on_grid(*masks[structure.tg263_name], series.geometry)
        np.testing.assert_array_equal(drawn, labels == label, err_msg=structure.name)
    assert np.count_nonzero(labels == len(CATALOGUE)) > 500


@pytest.mark.parametrize("position", DIRECTIONS)
def test_dciodvfy_and_dcentvfy_have_no_complaint(tmp_path: Path, position: str) -> None:
    paths = write_study(tmp_path / "study", random_volume(SHAPE, DIRECTIONS[position]))
    series = read_ct_series(tmp_path / "study")
    rtstruct = tmp_path / "rs.dcm"
    write_rtstruct(rtstruct, series, traced(series, hard_labels()), notes=["Resampled."], model_description="oar9")
    assert complaints("dciodvfy", rtstruct) == []
    assert complaints("dcentvfy", rtstruct, *paths) == []


def test_it_belongs_to_the_study_and_its_slices(tmp_path: Path, series: CTSeries) -> None:
    dataset = written(tmp_path / "rs.dcm", series, hard_labels())
    assert dataset.StudyInstanceUID == series.study_instance_uid
    assert dataset.FrameOfReferenceUID == series.frame_of_reference_uid
    assert dataset.SeriesInstanceUID != series.series_instance_uid
    assert {k: str(dataset[k].value) for k in PATIENT} == PATIENT
    (frame,) = dataset.ReferencedFrameOfReferenceSequence
    (study,) = frame.RTReferencedStudySequence
    (referenced,) = study.RTReferencedSeriesSequence
    assert frame.FrameOfReferenceUID == series.frame_of_reference_uid
    assert study.ReferencedSOPInstanceUID == series.study_instance_uid
    assert referenced.SeriesInstanceUID == series.series_instance_uid
    images = [image.ReferencedSOPInstanceUID for image in referenced.ContourImageSequence]
    assert images == [s.sop_instance_uid for s in series.slices]
    assert {roi.ReferencedFrameOfReferenceUID for roi in dataset.StructureSetROISequence} == {
        series.frame_of_reference_uid
    }


def test_each_contour_lies_in_the_plane_of_the_slice_it_names(tmp_path: Path) -> None:
    paths = write_study(tmp_path / "study", random_volume(SHAPE))
    for k, path in enumerate(paths):  # uneven, as far as a study may be
        edit(path, ImagePositionPatient=[-100.3, 45.123, -312.7 + 2.5 * k + 0.04 * (-1) ** k])
    series = read_ct_series(tmp_path / "study")
    height = {s.sop_instance_uid: s.position[2] for s in series.slices}
    dataset = written(tmp_path / "rs.dcm", series, hard_labels())
    contours = [c for roi in dataset.ROIContourSequence for c in roi.ContourSequence]
    assert len({c.ContourImageSequence[0].ReferencedSOPInstanceUID for c in contours}) == SHAPE[0]
    for contour in contours:
        points = np.reshape(contour.ContourData, (-1, 3)).astype(float)
        assert len(points) == contour.NumberOfContourPoints >= 3
        assert contour.ContourGeometricType == "CLOSED_PLANAR"
        expected = height[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
        np.testing.assert_allclose(points[:, 2], expected, rtol=0, atol=POINT_TOLERANCE_MM)


def test_points_are_the_contours_placed_by_the_geometry(tmp_path: Path, series: CTSeries) -> None:
    contours = traced(series, hard_labels())
    write_rtstruct(tmp_path / "rs.dcm", series, contours)
    dataset = pydicom.dcmread(tmp_path / "rs.dcm")
    for found, roi in zip(contours, dataset.ROIContourSequence, strict=True):
        for contour, item in zip(found.contours, roi.ContourSequence, strict=True):
            indices = np.column_stack([contour.points, np.full(len(contour.points), contour.slice_index)])
            expected = series.geometry.points_from_indices(indices)
            points = np.reshape(item.ContourData, (-1, 3)).astype(float)
            np.testing.assert_allclose(points, expected, rtol=0, atol=POINT_TOLERANCE_MM)


def test_each_organ_found_is_one_roi(tmp_path: Path, series: CTSeries) -> None:
    labels = hard_labels()
    labels[labels == 2] = 0
    dataset = written(tmp_path / "rs.dcm", series, labels, "oar9, checkpoint 0123456789ab")
    expected = [s for s in CATALOGUE if s.name != "Mandible"]
    assert [roi.ROIName for roi in dataset.StructureSetROISequence] == [s.tg263_name for s in expected]
    assert {roi.ROIGenerationAlgorithm for roi in dataset.StructureSetROISequence} == {"AUTOMATIC"}
    assert [tuple(roi.ROIDisplayColor) for roi in dataset.ROIContourSequence] == [s.colour for s in expected]
    assert {roi.RTROIInterpretedType for roi in dataset.RTROIObservationsSequence} == {"ORGAN"}
    numbers = [roi.ROINumber for roi in dataset.StructureSetROISequence]
    assert numbers == [roi.ReferencedROINumber for roi in dataset.ROIContourSequence]
    assert numbers == [roi.ReferencedROINumber for roi in dataset.RTROIObservationsSequence]
    assert dataset.ApprovalStatus == "UNAPPROVED"
    assert dataset.StructureSetDescription == "oar9, checkpoint 0123456789ab"


def test_a_structure_that_was_not_found_is_named_by_every_roi(tmp_path: Path, series: CTSeries) -> None:
    """It has no ROI of its own, and who gets the file alone would not miss it."""
    labels = hard_labels()
    labels[labels == 2] = 0
    findings = (Finding("Bone_Mandible", "not found on this CT", None), Finding("Brainstem", "in 2 pieces", None))
    write_rtstruct(tmp_path / "rs.dcm", series, traced(series, labels), notes=["a note"], findings=findings)
    rois = pydicom.dcmread(tmp_path / "rs.dcm").StructureSetROISequence
    missing = "Bone_Mandible: not found on this CT; a note"
    assert {roi.ROIName: roi.ROIDescription for roi in rois} == {
        roi.ROIName: f"in 2 pieces; {missing}" if roi.ROIName == "Brainstem" else missing for roi in rois
    }


def test_texts_are_no_longer_than_dicom_allows(tmp_path: Path, series: CTSeries) -> None:
    write_rtstruct(tmp_path / "rs.dcm", series, traced(series, hard_labels()), notes=["x" * 2000])
    dataset = pydicom.dcmread(tmp_path / "rs.dcm")
    assert len(dataset.StructureSetLabel) <= LONGEST_SH
    assert all(len(structure.tg263_name) <= LONGEST_SH for structure in STRUCTURES.values())
    assert {len(roi.ROIDescription) for roi in dataset.StructureSetROISequence} == {1024}
    for roi in dataset.ROIContourSequence:
        for contour in roi.ContourSequence:
            texts = [value.original_string for value in contour.ContourData]
            assert max(map(len, texts)) <= LONGEST_DS
            assert all(re.fullmatch(r"-?\d+(\.\d+)?", text) for text in texts)


def test_the_same_input_writes_the_same_but_for_identifiers_and_times(tmp_path: Path, series: CTSeries) -> None:
    files = [written(tmp_path / name, series, hard_labels()) for name in ("a.dcm", "b.dcm")]
    assert files[0].SOPInstanceUID != files[1].SOPInstanceUID
    assert files[0].SeriesInstanceUID != files[1].SeriesInstanceUID
    assert comparable(files[0]) == comparable(files[1])


def circle(points: int, series: CTSeries) -> StructureContours:
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    around = 20 + 15.123 * np.column_stack([np.cos(angles), np.sin(angles)])
    return StructureContours(CATALOGUE[0], (Contour(3, around),), series.geometry)


def by_pydicom(path: Path) -> bytes:
    """A file as pydicom writes it once all it holds has been put into new datasets."""

    def anew(dataset: Dataset) -> Dataset:
        copy = Dataset()
        for element in dataset:
            value = [anew(item) for item in element.value] if element.VR == "SQ" else element.value
            copy.add(DataElement(element.tag, element.VR, value))
        return copy

    source, buffer = pydicom.dcmread(path), BytesIO()
    copy = anew(source)
    copy.file_meta = source.file_meta
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of contours that are too long for their VR
        copy.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("points", [0, 3, 9000])
def test_pydicom_would_write_the_same_file(tmp_path: Path, series: CTSeries, points: int) -> None:
    contours = [circle(points, series)] if points else traced(series, hard_labels())
    write_rtstruct(tmp_path / "rs.dcm", series, contours, notes=["Resampled."], model_description="oar9")
    assert (tmp_path / "rs.dcm").read_bytes() == by_pydicom(tmp_path / "rs.dcm")


def test_a_contour_too_long_for_its_vr_is_whole(tmp_path: Path, series: CTSeries) -> None:
    found = circle(9000, series)
    write_rtstruct(tmp_path / "rs.dcm", series, [found])
    item = pydicom.dcmread(tmp_path / "rs.dcm").ROIContourSequence[0].ContourSequence[0]
    assert item["ContourData"].VR == "UN"  # PS3.5 6.2.2; pydicom leaves its bytes as they are
    points = np.array(item.ContourData.split(b"\\")).astype(float).reshape(-1, 3)
    indices = np.column_stack([found.contours[0].points, np.full(9000, 3)])
    expected = series.geometry.points_from_indices(indices)
    np.testing.assert_allclose(points, expected, rtol=0, atol=POINT_TOLERANCE_MM)
    assert complaints("dciodvfy", tmp_path / "rs.dcm") == []


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 192", "Пётр^Ärger=王^小東"),
        ("ISO_IR 144", "Юлия^Фёдорова"),
        ("ISO_IR 100", "Buc^Jérôme"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
    ],
)
def test_names_keep_their_character_set(tmp_path: Path, charset: str | list[str], name: str) -> None:
    for path in write_study(tmp_path / "study", random_volume(SHAPE)):
        edit(path, SpecificCharacterSet=charset, PatientName=name, StudyDescription=name.split("=")[-1])
    series = read_ct_series(tmp_path / "study")
    dataset = written(tmp_path / "rs.dcm", series, hard_labels())
    source = pydicom.dcmread(series.slices[0].path)
    for keyword in ("SpecificCharacterSet", "PatientName", "StudyDescription"):
        assert dataset.get_item(keyword).value == source.get_item(keyword).value
        assert dataset[keyword].value == source[keyword].value
    assert complaints("dcentvfy", tmp_path / "rs.dcm", *(s.path for s in series.slices)) == []


def test_odd_headers_are_copied_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    paths = write_study(tmp_path / "study", random_volume(SHAPE), SpecificCharacterSet="ISO_IR 192", StudyID="A" * 16)
    for path in paths:  # no date, no time, and a name that is no UTF-8: the bytes of old archives
        content = path.read_bytes().replace(b"19610102", b"1961.1.2").replace(b"Meier^", b"M\xfcler^")
        path.write_bytes(content)
    recwarn.clear()
    series = read_ct_series(tmp_path / "study")
    write_rtstruct(tmp_path / "rs.dcm", series, traced(series, hard_labels()))
    assert not recwarn.list
    assert b"1961.1.2" in (tmp_path / "rs.dcm").read_bytes()


def test_what_the_ct_lacks_is_there_and_empty(tmp_path: Path) -> None:
    lacking = ["PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber"]
    lacking += ["ReferringPhysicianName", "StudyDate", "StudyTime", "PositionReferenceIndicator"]
    for path in write_study(tmp_path / "study", random_volume(SHAPE)):
        edit(path, **dict.fromkeys(lacking))
    dataset = written(tmp_path / "rs.dcm", read_ct_series(tmp_path / "study"), hard_labels())
    assert {keyword for keyword in lacking if keyword in dataset and dataset[keyword].is_empty} == set(lacking)
    # What remains is that a DICOMDIR could not be built of it: the CT's own fault.
    assert not [line for line in complaints("dciodvfy", tmp_path / "rs.dcm") if "DICOMDIR" not in line]


def test_a_file_that_is_there_is_kept(tmp_path: Path, series: CTSeries) -> None:
    path = tmp_path / "rs.dcm"
    path.write_text("older")
    contours = traced(series, hard_labels())
    with pytest.raises(OutputError, match="exists"):
        write_rtstruct(path, series, contours)
    assert path.read_text() == "older"
    write_rtstruct(path, series, contours, overwrite=True)
    assert pydicom.dcmread(path).Modality == "RTSTRUCT"


def test_nothing_half_written_is_left(tmp_path: Path, series: CTSeries) -> None:
    contours = traced(series, hard_labels())
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # what a full disk does
    try:
        with pytest.raises(OutputError, match=r"rs\.dcm could not be written"):
            write_rtstruct(tmp_path / "rs.dcm", series, contours)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(OutputError):
        write_rtstruct(tmp_path / "nowhere" / "rs.dcm", series, contours)
    assert sorted(tmp_path.iterdir()) == before


def test_no_structure_is_no_file(tmp_path: Path, series: CTSeries) -> None:
    with pytest.raises(OutputError, match="no structure was found"):
        write_rtstruct(tmp_path / "rs.dcm", series, traced(series, np.zeros(SHAPE, np.uint8)))
    assert not (tmp_path / "rs.dcm").exists()


@pytest.mark.parametrize("change", ["shape", "origin", "direction"])
def test_contours_of_another_grid_are_refused(tmp_path: Path, series: CTSeries, change: str) -> None:
    grid = series.geometry
    other = {
        "shape": VolumeGeometry((11, 40, 43), grid.spacing, grid.origin, grid.direction),
        "origin": VolumeGeometry(grid.shape, grid.spacing, (-100.3, 45.2, -312.7), grid.direction),
        "direction": VolumeGeometry(grid.shape, grid.spacing, grid.origin, DIRECTIONS["FFS"]),
    }[change]
    labels = hard_labels()[:, :, : other.shape[2]]
    with pytest.raises(GeometryError, match="expected the series' own"):
        write_rtstruct(tmp_path / "rs.dcm", series, trace_contours(LabelMap(labels, other, CATALOGUE)))
    assert not (tmp_path / "rs.dcm").exists()
