"""RTSTRUCT, SEG and NIfTI say the same, voxel for voxel, to tools that no one here wrote."""

import builtins
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from anatomynet.client.contours import exact_tolerance_mm, trace_contours
from anatomynet.client.dicom_object import TYPE_2_KEYWORDS
from anatomynet.client.header_elements import PATIENT_AND_STUDY_KEYWORDS
from anatomynet.client.mask_files import read_structures
from anatomynet.client.nifti import write_nifti
from anatomynet.client.outputs import output_paths
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.seg import ANATOMY, write_seg
from anatomynet.client.structure_table import load_structure_table
from anatomynet.client.study import CTSeries, read_ct_series
from anatomynet.engine.errors import GeometryError, OutputError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.structures import STRUCTURES
from anatomynet.engine.volume import LabelMap
from tests.dicom_studies import (
    DIRECTIONS,
    complaints,
    edit,
    errors_of_judges,
    masks_by_plastimatch,
    on_grid,
    random_volume,
    write_study,
)
from tests.test_rtstruct import CATALOGUE, SHAPE, hard_labels

pytest.importorskip("highdicom")
pytest.importorskip("nibabel")


@pytest.fixture(params=["HFS", "FFP", "sagittal"])
def series(request: pytest.FixtureRequest, tmp_path: Path) -> CTSeries:
    write_study(tmp_path / "study", random_volume(SHAPE, DIRECTIONS[request.param]))
    return read_ct_series(tmp_path / "study")


@pytest.fixture
def label_map(series: CTSeries) -> LabelMap:
    labels = hard_labels()
    labels[labels == 2] = 0  # one that was not found
    return LabelMap(labels, series.geometry, CATALOGUE)


def by_simpleitk(path: Path, series: CTSeries) -> Any:
    import SimpleITK

    sitk: Any = SimpleITK
    image = sitk.ReadImage(str(path))
    width, height, depth = image.GetSize()
    a, b, c, d, e, f, g, h, i = image.GetDirection()
    direction = ((a, b, c), (d, e, f), (g, h, i))
    geometry = VolumeGeometry((depth, height, width), image.GetSpacing(), image.GetOrigin(), direction)
    return on_grid(sitk.GetArrayFromImage(image), geometry, series.geometry)


def by_highdicom(path: Path, series: CTSeries) -> dict[str, Any]:
    import highdicom

    seg: Any = highdicom.seg.segread(path)
    uids = [s.sop_instance_uid for s in series.slices]
    masks = seg.get_pixels_by_source_instance(uids, ignore_spatial_locations=True, assert_missing_frames_are_empty=True)
    return {seg.get_segment_description(n).segment_label: masks[..., n - 1] > 0 for n in seg.segment_numbers}


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom", "ignore::UserWarning:highdicom")
def test_all_three_agree_voxel_for_voxel(tmp_path: Path, series: CTSeries, label_map: LabelMap) -> None:
    contours = trace_contours(label_map, tolerance_mm=exact_tolerance_mm(series.geometry))
    write_rtstruct(tmp_path / "rs.dcm", series, contours)
    write_seg(tmp_path / "seg.dcm", series, label_map)
    write_nifti(tmp_path / "map.nii.gz", label_map)
    contoured = masks_by_plastimatch(tmp_path / "rs.dcm", tmp_path / "study", tmp_path / "masks")
    segmented = by_highdicom(tmp_path / "seg.dcm", series)
    labelled = by_simpleitk(tmp_path / "map.nii.gz", series)
    np.testing.assert_array_equal(labelled, label_map.labels)
    found = {s.tg263_name: label for label, s in enumerate(CATALOGUE, start=1) if s.name != "Mandible"}
    assert contoured.keys() == segmented.keys() == found.keys()
    for name, label in found.items():
        np.testing.assert_array_equal(on_grid(*contoured[name], series.geometry), labelled == label)
        np.testing.assert_array_equal(segmented[name], labelled == label)


def test_what_is_written_is_read_again_here(tmp_path: Path, series: CTSeries, label_map: LabelMap) -> None:
    write_seg(tmp_path / "seg.dcm", series, label_map)
    for roi in read_structures(tmp_path / "seg.dcm", series).rois:
        label = next(n for n, s in enumerate(CATALOGUE, start=1) if s.tg263_name == roi.name)
        np.testing.assert_array_equal(roi.mask(series.geometry), label_map.labels == label)


def test_the_segmentation_refers_to_its_series(tmp_path: Path, series: CTSeries, label_map: LabelMap) -> None:
    write_seg(tmp_path / "seg.dcm", series, label_map)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    (referenced,) = seg.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == series.series_instance_uid
    uids = {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence}
    assert uids == {s.sop_instance_uid for s in series.slices}
    assert (seg.StudyInstanceUID, seg.FrameOfReferenceUID) == (
        series.study_instance_uid,
        series.frame_of_reference_uid,
    )
    parotid = next(s for s in seg.SegmentSequence if s.SegmentLabel == "Parotid_R")
    (kind,) = parotid.SegmentedPropertyTypeCodeSequence
    assert (kind.CodeValue, kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning) == ("45289007", "Right")
    assert not [line for line in complaints("dciodvfy", tmp_path / "seg.dcm") if line.startswith("Error")]


ODD_HEADERS: dict[str, dict[str, Any]] = {
    "a name without a caret": {"PatientName": "Secret"},  # highdicom warns of it, by its value
    "nothing that may be empty": dict.fromkeys(TYPE_2_KEYWORDS),
    "a sex that is none": {"PatientSex": "W"},
    "more than a SEG needs": {"PatientComments": "Secret", "StudyDescription": "Secret", "PatientAge": "064Y"},
}


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("case", ODD_HEADERS)
def test_of_the_patient_a_segmentation_says_what_the_rtstruct_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    paths = write_study(tmp_path / "study", random_volume(SHAPE))
    for path in paths:
        edit(path, **ODD_HEADERS[case])
        path.write_bytes(path.read_bytes().replace(b"19610102", b"1961.1.2"))
    series = read_ct_series(tmp_path / "study")
    label_map = LabelMap(hard_labels(), series.geometry, CATALOGUE)
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    write_seg(tmp_path / "seg.dcm", series, label_map)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    write_rtstruct(tmp_path / "rs.dcm", series, trace_contours(label_map))
    seg, rtstruct = (pydicom.dcmread(tmp_path / name) for name in ("seg.dcm", "rs.dcm"))
    for keyword in (*PATIENT_AND_STUDY_KEYWORDS, "PatientComments", "PatientAge"):
        assert (keyword in seg) == (keyword in rtstruct), keyword
        if keyword in seg:
            assert seg.get_item(keyword).value == rtstruct.get_item(keyword).value, keyword


def test_every_segment_says_which_model_drew_it(tmp_path: Path, series: CTSeries, label_map: LabelMap) -> None:
    write_seg(tmp_path / "seg.dcm", series, label_map, model_description="oar9, checkpoint 0123456789ab")
    for segment in pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence:
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, segment.SegmentAlgorithmName) == ("AnatomyNet", "AnatomyNet")
        assert "oar9, checkpoint 0123456789ab" in algorithm.AlgorithmParameters
    assert errors_of_judges(series, tmp_path / "seg.dcm") == []


def test_every_structure_has_a_code() -> None:
    assert {name.removesuffix("_L").removesuffix("_R") for name in STRUCTURES} == set(ANATOMY)


def test_the_label_table_names_every_label(tmp_path: Path, label_map: LabelMap) -> None:
    (tmp_path / "table.toml").write_text("[Chiasm]\nname = 'CHIASMA'\ncolour = [255, 0, 16]\n")
    write_nifti(tmp_path / "map.nii", label_map, table=load_structure_table(tmp_path / "table.toml"))
    rows = (tmp_path / "map.labels.tsv").read_text().splitlines()
    assert rows[0].split("\t") == ["index", "name", "color"]
    assert rows[5] == "5\tCHIASMA\t#ff0010"
    assert len(rows) == len(CATALOGUE) + 1


def test_the_same_map_is_the_same_bytes(tmp_path: Path, label_map: LabelMap) -> None:
    for name in ("one.nii.gz", "two.nii.gz"):
        write_nifti(tmp_path / name, label_map)
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "two.nii.gz").read_bytes()


def test_another_grid_and_nothing_found_are_refused(tmp_path: Path, series: CTSeries) -> None:
    nothing = LabelMap(np.zeros(SHAPE, np.uint8), series.geometry, CATALOGUE)
    with pytest.raises(OutputError, match="no structure was found"):
        write_seg(tmp_path / "seg.dcm", series, nothing)
    elsewhere = LabelMap(hard_labels(), VolumeGeometry(SHAPE, (1, 1, 1)), CATALOGUE)
    with pytest.raises(GeometryError, match="the series' own grid"):
        write_seg(tmp_path / "seg.dcm", series, elsewhere)
    assert not (tmp_path / "seg.dcm").exists()


@pytest.mark.parametrize(("kind", "package"), [("seg", "highdicom"), ("nifti", "nibabel")])
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OutputError, match=rf"{package}: pip install 'anatomynet\[formats\]'"):
        output_paths([kind], tmp_path / "study", output=None, overwrite=False)


def test_names_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(types: str, output: str | None) -> list[str]:
        path = tmp_path / output if output else None
        paths = output_paths(types.split(","), tmp_path / "pat.1", output=path, overwrite=False)
        return [path.name for path in paths.values()]

    assert names("rtstruct", None) == ["pat.1.rtstruct.dcm"]
    assert names("rtstruct,seg, NIfTI", None) == ["pat.1.rtstruct.dcm", "pat.1.seg.dcm", "pat.1.nii.gz"]
    assert names("rtstruct,seg,nifti", "rs.dcm") == ["rs.dcm", "rs.seg.dcm", "rs.nii.gz"]
    assert names("nifti,rtstruct", "map.nii.gz") == ["map.nii.gz", "map.rtstruct.dcm"]
    (tmp_path / "pat.1" / "CT").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "pat.1" / "CT")
    for study, name in ((".", "CT"), ("..", "pat.1")):  # beside the study, called after it
        (path,) = output_paths(["rtstruct"], Path(study), output=None, overwrite=False).values()
        assert path == Path(study).resolve().parent / f"{name}.rtstruct.dcm"
    with pytest.raises(OutputError, match="unknown output type 'stl'; expected some of rtstruct, seg, nifti"):
        names("rtstruct,stl", None)
    (tmp_path / "pat.1.labels.tsv").touch()
    with pytest.raises(OutputError, match=r"labels\.tsv exists"):
        names("nifti", None)


@pytest.mark.parametrize(
    ("output", "types"),
    [("head.seg.dcm", "rtstruct,seg"), ("head.nii.gz", "rtstruct,nifti"), ("a.nii.gz", "seg,nifti")],
)
def test_two_outputs_of_one_name_are_refused(tmp_path: Path, output: str, types: str) -> None:
    first, second = types.split(",")
    with pytest.raises(OutputError, match=f"{output} would be both {first} and {second}"):
        output_paths([first, second], tmp_path / "study", output=tmp_path / output, overwrite=True)
    output_paths([second, first], tmp_path / "study", output=tmp_path / output, overwrite=True)
