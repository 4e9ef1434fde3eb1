"""What a client must survive, as one table: a row is one study, generated, and the one outcome that is safe.

The numbers are those of a list of thirty, in its order of harm and frequency. Whatever a row draws, dciodvfy and
dcentvfy judge it too.
"""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import MPEG2MPML, UID, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless, generate_uid

from anatomynet.client.connection import ServerOptions
from anatomynet.client.contours import exact_tolerance_mm, trace_contours
from anatomynet.client.pipeline import SegmentOptions, segment_study
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.seg import write_seg
from anatomynet.client.structure_table import load_structure_table
from anatomynet.client.study import CTSeries, read_ct_series, volume_from_series
from anatomynet.client.triton import FIRST_PAUSE_S
from anatomynet.engine.errors import AnatomyNetError, ServerError
from anatomynet.engine.geometry import Direction
from anatomynet.engine.structures import STRUCTURES
from anatomynet.engine.volume import LabelMap
from tests.dicom_studies import (
    DIRECTIONS,
    PATIENT,
    errors_of_judges,
    masks_by_plastimatch,
    on_grid,
    random_volume,
    words_of_patient,
    write_study,
)
from tests.test_codecs import compress
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
from tests.triton_servers import free_ports

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
HUGE = (1000, 40, 44)
SERVER_WAIT_S = 2.0


def labels_on(series: CTSeries) -> LabelMap:
    """Every hard shape, in the first slices; and one structure that was not found."""
    labels = np.zeros(series.geometry.shape, np.uint8)
    labels[: SHAPE[0]] = hard_labels()
    return LabelMap(labels, series.geometry, (*CATALOGUE, NOT_FOUND))


# ---- what is done to a study ----


def intact(_: Path, __: list[Path]) -> None:
    """Nothing is wrong with the study."""


def compressed(syntax: UID) -> Damage:
    def damage(_: Path, paths: list[Path]) -> None:
        for path in paths:
            compress(path, syntax)

    return damage


def said_to_be_a_film(_: Path, paths: list[Path]) -> None:
    for path in paths:
        dataset = pydicom.dcmread(path)
        dataset.PixelData = pydicom.encaps.encapsulate([dataset.PixelData])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = MPEG2MPML
        dataset.save_as(path, implicit_vr=False, little_endian=True)


def make_huge(folder: Path, paths: list[Path]) -> None:
    for path in paths:
        path.unlink()
    write_study(folder, random_volume(HUGE))


def add_second_series(folder: Path, paths: list[Path]) -> None:
    uid = generate_uid()
    for path in paths:
        dataset = pydicom.dcmread(path)
        dataset.SeriesInstanceUID, dataset.SOPInstanceUID = uid, generate_uid()
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(folder / f"second-{path.name}")


def on_media(folder: Path, paths: list[Path]) -> None:
    """As a CD has it: files without a suffix in a folder, and dcmtk's DICOMDIR of them."""
    if shutil.which("dcmmkdir") is None:
        pytest.skip("dcmmkdir is not installed: apt install dcmtk")
    (folder / "CT").mkdir()
    for k, path in enumerate(paths):
        path.rename(folder / "CT" / f"IM{k}")
    subprocess.run(["dcmmkdir", "+I", "+r", "CT"], cwd=folder, check=True, capture_output=True)
    assert len(pydicom.dcmread(folder / "DICOMDIR").DirectoryRecordSequence) >= len(paths)


def without_suffix_in_folders(folder: Path, paths: list[Path]) -> None:
    for k, path in enumerate(paths):
        target = folder / f"disk{k % 2}" / f"IM{k}"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)


# ---- what must come of it ----


def plastimatch_draws_the_labels(drawn: Drawn) -> None:
    masks = masks_by_plastimatch(drawn.path, drawn.series.slices[0].path.parent, drawn.path.with_name("masks"))
    for label, structure in enumerate(CATALOGUE, start=1):
        mask = on_grid(*masks[structure.tg263_name], drawn.series.geometry)
        np.testing.assert_array_equal(mask, hard_labels() == label, err_msg=structure.name)


def all_slices_are_read(drawn: Drawn) -> None:
    assert len(drawn.series.slices) == SHAPE[0]
    hu = random_volume(SHAPE, DIRECTIONS["HFS"]).hu
    np.testing.assert_array_equal(volume_from_series(drawn.series).hu, hu)


def every_slice_of_many(drawn: Drawn) -> None:
    np.testing.assert_array_equal(volume_from_series(drawn.series).hu, random_volume(HUGE).hu)
    slices_are_named(drawn)


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


def organs(drawn: Drawn) -> None:
    assert {o.RTROIInterpretedType for o in drawn.rtstruct.RTROIObservationsSequence} == {"ORGAN"}


def by_machine(drawn: Drawn) -> None:
    assert {r.ROIGenerationAlgorithm for r in drawn.rtstruct.StructureSetROISequence} == {"AUTOMATIC"}
    assert drawn.rtstruct.ApprovalStatus == "UNAPPROVED"


def character_set_is_kept(drawn: Drawn) -> None:
    assert drawn.rtstruct.SpecificCharacterSet == "ISO_IR 100"
    assert str(drawn.rtstruct.PatientName) == "M\u00fcller^J\u00f6rg"


def absent_is_empty(drawn: Drawn) -> None:
    for keyword in ("AccessionNumber", "StudyID", "PatientSex"):
        assert drawn.rtstruct[keyword].is_empty


def drawn_only_when_complete(drawn: Drawn) -> None:
    """As it comes to a DICOM node, slice by slice, and once with an association that breaks."""
    pytest.importorskip("pynetdicom", reason="no DICOM node without it: pip install 'anatomynet[node]'")
    from anatomynet.client.node_spool import PARKED, READY, Spool
    from tests.dicom_nodes import instance_from
    from tests.test_node_arrivals import arrivals_of, complete, receive

    instances = [instance_from(s.path) for s in drawn.series.slices]
    states = []
    for released in (True, False):
        spool = Spool(drawn.path.with_name(f"spool-{released}"))
        spool.prepare()
        arrivals = arrivals_of(spool)
        for instance in instances[: None if released else -1]:
            receive(arrivals, [instance])
            assert not arrivals.settled(quiet_seconds=60, after_release=0)
            assert not list(spool.jobs(READY))
        (arrivals.release if released else arrivals.lose)("association")
        (key,) = arrivals.settled(quiet_seconds=0, after_release=0)
        states.append(complete(arrivals, key).state)
    assert states == [READY, PARKED]


def server_is_given_up_in_time(drawn: Drawn) -> None:
    told: list[str] = []
    url = f"127.0.0.1:{free_ports(1)[0]}"
    options = SegmentOptions(
        server=ServerOptions(urls=(url,), wait_s=SERVER_WAIT_S, tell=told.append), output=drawn.path.with_name("no.dcm")
    )
    start = time.monotonic()
    with pytest.raises(ServerError, match=url):
        segment_study(drawn.series.slices[0].path.parent, options)
    assert time.monotonic() - start < 5 * SERVER_WAIT_S  # less than it waits unless told
    assert 1 <= len(told) <= 2 * SERVER_WAIT_S / FIRST_PAUSE_S
    assert not drawn.path.with_name("no.dcm").exists()


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
    "1 slices that stand coronal": ("coronal", intact, plastimatch_draws_the_labels),
    "2 no detour by other axes": ("sagittal", intact, plastimatch_draws_the_labels),
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
    "12 a reformat beside": (HFS, add_reformat_series, all_slices_are_read),
    "12 several series": (HFS, add_second_series, "2 CT series in the folder: .*choose one with --series"),
    "12 nested folders": (HFS, without_suffix_in_folders, all_slices_are_read),
    "13 each slice named": (HFS, intact, slices_are_named),
    "14 chain of UIDs": (HFS, intact, same_uids),
    "15 texts of 16 characters": (HFS, intact, short_texts),
    "16 head first prone": ("HFP", intact, plastimatch_draws_the_labels),
    "16 feet first supine": ("FFS", intact, plastimatch_draws_the_labels),
    "16 feet first prone": ("FFP", intact, plastimatch_draws_the_labels),
    "17 interpreted type": (HFS, intact, organs),
    "18 generated by a machine": (HFS, intact, by_machine),
    "19 character set": (
        HFS,
        each(SpecificCharacterSet="ISO_IR 100", PatientName="M\u00fcller^J\u00f6rg"),
        character_set_is_kept,
    ),
    "20 type 2 absent": (HFS, each(AccessionNumber=None, StudyID=None, PatientSex=None), absent_is_empty),
    "21 organ not found": (HFS, intact, no_empty_roi),
    "22 JPEG 2000": (HFS, compressed(JPEG2000Lossless), all_slices_are_read),
    "22 JPEG lossless": (HFS, compressed(JPEGLosslessSV1), all_slices_are_read),
    "22 JPEG-LS": (HFS, compressed(JPEGLSLossless), all_slices_are_read),
    "22 RLE": (HFS, compressed(RLELossless), all_slices_are_read),
    "22 no codec for it": (HFS, said_to_be_a_film, "compressed as MPEG2 .* no decoder is installed: export"),
    "23 nothing of the patient": (HFS, each(**PATIENT), no_patient_in_words),
    "24 a thousand slices": (HFS, make_huge, every_slice_of_many),
    "25 DICOMDIR": (HFS, on_media, all_slices_are_read),
    "25 other files beside": (HFS, add_other_files, all_slices_are_read),
    "26 colours": (HFS, intact, colours_of_the_table),
    "27 a series that still arrives": (HFS, intact, drawn_only_when_complete),
    "28 a server that is away": (HFS, intact, server_is_given_up_in_time),
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


def test_every_number_of_the_list_has_a_row() -> None:
    assert {int(case.split()[0]) for case in CASES} == set(range(1, 31))


@pytest.mark.parametrize("case", CASES)
def test_a_study_is_drawn_safely_or_refused_in_one_line(tmp_path: Path, case: str) -> None:
    position, damage, outcome = CASES[case]
    direction: Direction = DIRECTIONS[position]
    paths = write_study(tmp_path / "study", random_volume(SHAPE, direction))
    damage(tmp_path / "study", paths)
    if not isinstance(outcome, str):
        drawn = drawn_on(tmp_path / "study")
        outcome(drawn)
        assert errors_of_judges(drawn.series, drawn.path) == []
        return
    with pytest.raises(AnatomyNetError, match=outcome) as refusal:
        volume_from_series(drawn_on(tmp_path / "study").series)
    assert "\n" not in str(refusal.value)
    assert not any(word in str(refusal.value) for word in words_of_patient())
