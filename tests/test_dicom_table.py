"""What a client must survive, as one table: a row is one study, generated, and the one outcome that is safe.

The numbers are those of the list in its order of harm and frequency. Three have no row, since no study makes them:
24 (huge volumes), 27 (a series that is still arriving) and 28 (retries).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEGLSLossless, RLELossless

from anatomynet.client.contours import exact_tolerance_mm, trace_contours
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.seg import write_seg
from anatomynet.client.structure_table import load_structure_table
from anatomynet.client.study import CTSeries, read_ct_series, volume_from_series
from anatomynet.engine.errors import AnatomyNetError
from anatomynet.engine.geometry import Direction
from anatomynet.engine.structures import STRUCTURES
from anatomynet.engine.volume import LabelMap
from tests.dicom_studies import (
    DIRECTIONS,
    PATIENT,
    complaints,
    masks_by_plastimatch,
    on_grid,
    random_volume,
    words_of_patient,
    write_study,
)
from tests.test_rtstruct import CATALOGUE, LONGEST_DS, LONGEST_SH, SHAPE, hard_labels
from tests.test_study import (
    add_localizers_that_say_axial,
    add_other_files,
    add_reformat_series,
    copy_a_slice,
    each,
    interleave,
    lose,
    shear,
    stretch,
    tilt,
)

Damage = Callable[[Path, list[Path]], None]
Check = Callable[["Drawn"], None]


@dataclass(frozen=True)
class Drawn:
    """A study, the RTSTRUCT of `hard_labels` on it, and its folder."""

    series: CTSeries
    path: Path
    rtstruct: pydicom.Dataset

    def contours(self) -> Iterator[pydicom.Dataset]:
        for roi in self.rtstruct.ROIContourSequence:
            yield from roi.ContourSequence


NOT_FOUND = STRUCTURES["Larynx"]


def labels_on(series: CTSeries) -> LabelMap:
    """Every hard shape, and one structure that was not found."""
    return LabelMap(hard_labels(), series.geometry, (*CATALOGUE, NOT_FOUND))


def intact(_: Path, __: list[Path]) -> None:
    """Nothing is wrong with the study."""


def compressed(syntax: str) -> Damage:
    def damage(_: Path, paths: list[Path]) -> None:
        for path in paths:
            dataset = pydicom.dcmread(path)
            dataset.compress(syntax, generate_instance_uid=False)
            dataset.save_as(path)

    return damage


def without_suffix_in_folders(folder: Path, paths: list[Path]) -> None:
    for k, path in enumerate(paths):
        target = folder / f"disk{k % 2}" / f"IM{k}"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)


def plastimatch_draws_the_labels(drawn: Drawn) -> None:
    masks = masks_by_plastimatch(drawn.path, drawn.series.slices[0].path.parent, drawn.path.with_name("masks"))
    for label, structure in enumerate(CATALOGUE, start=1):
        mask = on_grid(*masks[structure.tg263_name], drawn.series.geometry)
        np.testing.assert_array_equal(mask, hard_labels() == label, err_msg=structure.name)


def all_slices_are_read(drawn: Drawn) -> None:
    assert len(drawn.series.slices) == SHAPE[0]
    hu = random_volume(SHAPE, DIRECTIONS["HFS"]).hu
    np.testing.assert_array_equal(volume_from_series(drawn.series).hu, hu)


def same_uids(drawn: Drawn) -> None:
    source = pydicom.dcmread(drawn.series.slices[0].path)
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientName", "PatientID"):
        assert drawn.rtstruct[keyword].value == source[keyword].value
    assert drawn.rtstruct.SeriesInstanceUID != source.SeriesInstanceUID


def short_numbers(drawn: Drawn) -> None:
    for contour in drawn.contours():
        assert max(map(len, bytes(contour.get_item("ContourData").value).split(b"\\"))) <= LONGEST_DS


def short_texts(drawn: Drawn) -> None:
    names = [roi.ROIName for roi in drawn.rtstruct.StructureSetROISequence]
    assert max(map(len, [drawn.rtstruct.StructureSetLabel, *names])) <= LONGEST_SH


def slices_are_named(drawn: Drawn) -> None:
    position = {s.sop_instance_uid: s.position[2] for s in drawn.series.slices}
    for contour in drawn.contours():
        (image,) = contour.ContourImageSequence
        assert float(contour.ContourData[2]) == pytest.approx(position[image.ReferencedSOPInstanceUID], abs=1e-3)


def three_points_or_more(drawn: Drawn) -> None:
    assert min(len(contour.ContourData) // 3 for contour in drawn.contours()) >= 3


def organs_by_machine(drawn: Drawn) -> None:
    assert {o.RTROIInterpretedType for o in drawn.rtstruct.RTROIObservationsSequence} == {"ORGAN"}
    assert {r.ROIGenerationAlgorithm for r in drawn.rtstruct.StructureSetROISequence} == {"AUTOMATIC"}
    assert drawn.rtstruct.ApprovalStatus == "UNAPPROVED"


def character_set_is_kept(drawn: Drawn) -> None:
    assert drawn.rtstruct.SpecificCharacterSet == "ISO_IR 100"
    assert str(drawn.rtstruct.PatientName) == "M\u00fcller^J\u00f6rg"


def no_complaint(drawn: Drawn) -> None:
    assert not [line for line in complaints("dciodvfy", drawn.path) if "DICOMDIR" not in line]


def no_empty_roi(drawn: Drawn) -> None:
    assert all(roi.ContourSequence for roi in drawn.rtstruct.ROIContourSequence)
    assert NOT_FOUND.tg263_name not in [roi.ROIName for roi in drawn.rtstruct.StructureSetROISequence]


def colours_of_the_table(drawn: Drawn) -> None:
    table = load_structure_table()
    expected = [table[structure.name].colour for structure in CATALOGUE]
    assert [tuple(roi.ROIDisplayColor) for roi in drawn.rtstruct.ROIContourSequence] == expected


def no_patient_in_words(drawn: Drawn) -> None:
    assert not any(word in repr(drawn.series) for word in words_of_patient())


def fewer_points(drawn: Drawn) -> None:
    full = trace_contours(LabelMap(hard_labels(), drawn.series.geometry, CATALOGUE))
    assert sum(len(c.ContourData) // 3 for c in drawn.contours()) < sum(len(c.points) for f in full for c in f.contours)


def half_a_voxel_beyond_the_centre(drawn: Drawn) -> None:
    """A lone voxel's contour is as wide and as high as the voxel."""
    nerve = drawn.rtstruct.ROIContourSequence[2]
    image = drawn.series.slices[6].sop_instance_uid
    (lone,) = (c for c in nerve.ContourSequence if c.ContourImageSequence[0].ReferencedSOPInstanceUID == image)
    points = np.reshape(lone.ContourData, (-1, 3)).astype(float)
    np.testing.assert_allclose(np.ptp(points, axis=0), (*drawn.series.geometry.spacing[:2], 0), atol=2e-3)


def segmentation_refers_to_the_series(drawn: Drawn) -> None:
    pytest.importorskip("highdicom")
    path = drawn.path.with_name("seg.dcm")
    write_seg(path, drawn.series, labels_on(drawn.series))
    (referenced,) = pydicom.dcmread(path).ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == drawn.series.series_instance_uid


# Number and case -> how the patient lies, what is done to the study, and the outcome: a check, or words of a refusal.
HFS = "HFS"
CASES: dict[str, tuple[str, Damage, Check | str]] = {
    "1 rows and columns negated": ("HFP", intact, plastimatch_draws_the_labels),
    "2 slices that stand sagittal": ("sagittal", intact, plastimatch_draws_the_labels),
    "3 frame of reference": (HFS, intact, same_uids),
    "4 decimal strings of 16 bytes": (HFS, intact, short_numbers),
    "5 a missing slice": (HFS, lose(4), "missing slices, 1 in all"),
    "5 uneven spacing": (HFS, stretch, "uneven spacing"),
    "6 gantry tilt by position": (HFS, shear, "drift sideways"),
    "6 gantry tilt by orientation": (HFS, tilt, "oblique|drift"),
    "6 gantry tilt by header": (HFS, each(GantryDetectorTilt=5), "GantryDetectorTilt is 5.00"),
    "7 holes": (HFS, intact, plastimatch_draws_the_labels),
    "8 edges, not centres": (HFS, intact, half_a_voxel_beyond_the_centre),
    "9 contours of a voxel": (HFS, intact, three_points_or_more),
    "10 positions twice": (HFS, interleave, "2 acquisitions in one series"),
    "10 a slice twice": (HFS, copy_a_slice, "there twice"),
    "11 localizers in the series": (HFS, add_localizers_that_say_axial, all_slices_are_read),
    "12 several series": (HFS, add_reformat_series, all_slices_are_read),
    "12 nested folders": (HFS, without_suffix_in_folders, all_slices_are_read),
    "13 each slice named": (HFS, intact, slices_are_named),
    "14 chain of UIDs": (HFS, intact, same_uids),
    "15 texts of 16 characters": (HFS, intact, short_texts),
    "16 head first prone": ("HFP", intact, no_complaint),
    "16 feet first supine": ("FFS", intact, plastimatch_draws_the_labels),
    "16 feet first prone": ("FFP", intact, plastimatch_draws_the_labels),
    "17 and 18 organs, automatic": (HFS, intact, organs_by_machine),
    "19 character set": (
        HFS,
        each(SpecificCharacterSet="ISO_IR 100", PatientName="M\u00fcller^J\u00f6rg"),
        character_set_is_kept,
    ),
    "20 type 2 absent": (HFS, each(AccessionNumber=None, StudyID=None, PatientSex=None), no_complaint),
    "21 organ not found": (HFS, intact, no_empty_roi),
    "22 JPEG-LS": (HFS, compressed(JPEGLSLossless), all_slices_are_read),
    "22 RLE": (HFS, compressed(RLELossless), all_slices_are_read),
    "23 nothing of the patient": (HFS, each(**PATIENT), no_patient_in_words),
    "25 other files beside": (HFS, add_other_files, all_slices_are_read),
    "26 colours": (HFS, intact, colours_of_the_table),
    "29 segmentation": (HFS, intact, segmentation_refers_to_the_series),
    "30 points thinned": (HFS, intact, fewer_points),
}


def drawn_on(study: Path) -> Drawn:
    series = read_ct_series(study)
    label_map = labels_on(series)
    path = study.with_name("rs.dcm")
    contours = trace_contours(label_map, tolerance_mm=exact_tolerance_mm(series.geometry))
    write_rtstruct(path, series, contours)
    return Drawn(series, path, pydicom.dcmread(path))


@pytest.mark.parametrize("case", CASES)
def test_a_study_is_drawn_safely_or_refused_in_one_line(tmp_path: Path, case: str) -> None:
    position, damage, outcome = CASES[case]
    direction: Direction = DIRECTIONS[position]
    paths = write_study(tmp_path / "study", random_volume(SHAPE, direction))
    damage(tmp_path / "study", paths)
    if not isinstance(outcome, str):
        outcome(drawn_on(tmp_path / "study"))
        return
    with pytest.raises(AnatomyNetError, match=outcome) as refusal:
        drawn_on(tmp_path / "study")
    assert "\n" not in str(refusal.value)
    assert not any(word in str(refusal.value) for word in words_of_patient())
