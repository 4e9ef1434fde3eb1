"""Enhanced CT: every frame is a slice in its place, and contours name the frame they lie on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
    generate_uid,
)

from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.seg import write_seg
from anatomynet.client.study import CTSeries, read_ct_series, volume_from_series
from anatomynet.engine.errors import AnatomyNetError, GeometryError, OutputError, StudyError
from anatomynet.engine.volume import CTVolume, LabelMap
from tests.dicom_studies import (
    DIRECTIONS,
    complaints,
    edit,
    masks_by_plastimatch,
    on_grid,
    random_volume,
    words_of_patient,
    write_study,
)
from tests.enhanced_studies import Frames, write_enhanced
from tests.test_codecs import compress
from tests.test_rtstruct import CATALOGUE, SHAPE, by_pydicom, hard_labels, traced

# Slices as a scanner may give them: neither from the feet nor from the head.
MIXED = (3, 1, 0, 2, 10, 9, 8, 4, 5, 6, 7)


def frames_by_pydicom(path: Path) -> list[tuple[list[float], np.ndarray[Any, Any]]]:
    """Position and stored values of each frame, read by another hand."""
    dataset = pydicom.dcmread(path)
    positions = [
        [float(v) for v in item.PlanePositionSequence[0].ImagePositionPatient]
        for item in dataset.PerFrameFunctionalGroupsSequence
    ]
    return list(zip(positions, dataset.pixel_array, strict=True))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per frame"])
@pytest.mark.parametrize("position", DIRECTIONS)
def test_every_frame_is_read_to_its_place(tmp_path: Path, position: str, *, shared: bool) -> None:
    volume = random_volume(SHAPE, DIRECTIONS[position])
    path = write_enhanced(tmp_path / "study" / "ct", volume, Frames(MIXED, shared=shared))
    assert complaints("dciodvfy", path) == []
    series = read_ct_series(path.parent)
    frames = frames_by_pydicom(path)
    for ct_slice, hu in zip(series.slices, volume_from_series(series).hu, strict=True):
        place, expected = frames[ct_slice.frame - 1]
        np.testing.assert_allclose(ct_slice.position, place)
        np.testing.assert_array_equal(hu, expected)
    np.testing.assert_array_equal(volume_from_series(series).hu, volume.hu)
    np.testing.assert_allclose(series.geometry.affine, volume.geometry.affine, atol=1e-5)


def test_every_frame_has_its_own_slope_and_intercept(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    rescale = [(1 + n % 2 / 2, -10 * n) for n in range(SHAPE[0])]
    write_enhanced(tmp_path / "ct", volume, Frames(MIXED, rescale))
    hu = volume_from_series(read_ct_series(tmp_path)).hu
    for n, z in enumerate(MIXED):
        expected = np.clip(np.rint(volume.hu[z] * rescale[n][0] + rescale[n][1]), -32768, 32767)
        np.testing.assert_array_equal(hu[z], expected)


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless],
    ids=lambda uid: uid.name,
)
def test_transfer_syntaxes_bring_the_same_volume(tmp_path: Path, syntax: UID) -> None:
    if not get_decoder(syntax).is_available:
        pytest.skip(f"no decoder for {syntax.name}: pip install 'anatomynet[codecs]'")
    volume = random_volume((3, 72, 80))  # JPEG 2000 halves a slice five times
    path = write_enhanced(tmp_path / "ct", volume, Frames((2, 0, 1)))
    dataset = pydicom.dcmread(path)
    if syntax.is_compressed:
        compress(path, syntax)
    else:
        if not syntax.is_little_endian:
            dataset.PixelData = dataset.pixel_array.astype(">i2").tobytes()
        fresh = Dataset(dict(dataset.items()))
        fresh.file_meta = dataset.file_meta
        fresh.file_meta.TransferSyntaxUID = syntax
        list(fresh.iterall())  # converts what is still in the old encoding
        fresh.save_as(path, enforce_file_format=True)
    np.testing.assert_array_equal(volume_from_series(read_ct_series(tmp_path)).hu, volume.hu)


def test_the_rtstruct_is_that_of_the_classic_twin_but_names_frames(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    path = write_enhanced(tmp_path / "enhanced" / "ct", volume, Frames(MIXED))
    write_study(tmp_path / "classic", volume)
    rtstructs = []
    for name in ("enhanced", "classic"):
        series = read_ct_series(tmp_path / name)
        write_rtstruct(tmp_path / f"{name}.dcm", series, traced(series, hard_labels()))
        rtstructs.append(pydicom.dcmread(tmp_path / f"{name}.dcm"))
        assert (tmp_path / f"{name}.dcm").read_bytes() == by_pydicom(tmp_path / f"{name}.dcm")
    frames = frames_by_pydicom(path)
    pairs = 0
    for roi, twin in zip(*(r.ROIContourSequence for r in rtstructs), strict=True):
        for contour, expected in zip(roi.ContourSequence, twin.ContourSequence, strict=True):
            assert contour.ContourData == expected.ContourData
            (image,) = contour.ContourImageSequence
            assert image.ReferencedSOPInstanceUID == pydicom.dcmread(path).SOPInstanceUID
            height = frames[image.ReferencedFrameNumber - 1][0][2]
            assert float(contour.ContourData[2]) == pytest.approx(height, abs=1e-3)
            pairs += 1
    assert pairs > SHAPE[0]
    (image,) = _series_reference(rtstructs[0]).ContourImageSequence
    assert "ReferencedFrameNumber" not in image  # all of them


@pytest.mark.parametrize("position", DIRECTIONS)
def test_the_judges_agree(tmp_path: Path, position: str) -> None:
    """Plastimatch reads no enhanced CT: it draws on the classic twin, whose positions are the same."""
    volume = random_volume(SHAPE, DIRECTIONS[position])
    path = write_enhanced(tmp_path / "enhanced" / "ct", volume, Frames(MIXED))
    write_study(tmp_path / "classic", volume)
    series = read_ct_series(path.parent)
    write_rtstruct(tmp_path / "rs.dcm", series, traced(series, hard_labels()))
    assert complaints("dciodvfy", tmp_path / "rs.dcm") == []
    assert complaints("dcentvfy", tmp_path / "rs.dcm", path) == []
    masks = masks_by_plastimatch(tmp_path / "rs.dcm", tmp_path / "classic", tmp_path / "masks")
    for label, structure in enumerate(CATALOGUE, start=1):
        drawn = on_grid(*masks[structure.tg263_name], series.geometry)
        np.testing.assert_array_equal(drawn, hard_labels() == label, err_msg=structure.name)


def _series_reference(rtstruct: Dataset) -> Dataset:
    found: Dataset = (
        rtstruct.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    )
    return found


def masks_of_seg(path: Path, series: CTSeries) -> np.ndarray[Any, Any]:
    """Labels (z, y, x) of a SEG by its own positions, and the frame of the CT that each names checked on the way."""
    labels = np.zeros(series.geometry.shape, np.uint8)
    dataset = pydicom.dcmread(path)
    for plane, item in zip(dataset.pixel_array, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        place = [float(v) for v in item.PlanePositionSequence[0].ImagePositionPatient]
        (z,) = [k for k, s in enumerate(series.slices) if np.allclose(s.position, place, atol=1e-4)]
        (source,) = item.DerivationImageSequence[0].SourceImageSequence
        assert source.ReferencedFrameNumber == series.slices[z].frame
        labels[z][plane > 0] = item.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    return labels


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per frame"])
@pytest.mark.parametrize("position", ["HFS", "FFP", "sagittal"])
def test_a_segmentation_lies_on_its_frames(tmp_path: Path, position: str, *, shared: bool) -> None:
    pytest.importorskip("highdicom")
    path = write_enhanced(
        tmp_path / "study" / "ct", random_volume(SHAPE, DIRECTIONS[position]), Frames(MIXED, shared=shared)
    )
    series = read_ct_series(path.parent)
    write_seg(tmp_path / "seg.dcm", series, LabelMap(hard_labels(), series.geometry, CATALOGUE))
    np.testing.assert_array_equal(masks_of_seg(tmp_path / "seg.dcm", series), hard_labels())
    assert complaints("dciodvfy", tmp_path / "seg.dcm") == []
    assert complaints("dcentvfy", tmp_path / "seg.dcm", path) == []


def part_of(volume: CTVolume, start: int, stop: int) -> CTVolume:
    _, height, width = volume.geometry.shape
    return CTVolume(volume.hu[start:stop], volume.geometry.cropped((start, 0, 0), (stop, height, width)))


def set_of_each(path: Path, groups: str, **changes: Any) -> None:
    """Change elements of one functional group of every frame, or add the group."""
    dataset = pydicom.dcmread(path)
    for item in dataset.PerFrameFunctionalGroupsSequence:
        if groups not in item:
            setattr(item, groups, [Dataset()])
        for keyword, value in changes.items():
            setattr(item[groups][0], keyword, value)
    dataset.save_as(path)


def test_a_series_in_several_files_is_one_stack(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    same: dict[str, Any] = {k: generate_uid() for k in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    for start, stop in ((6, 11), (0, 6)):
        write_enhanced(tmp_path / "study" / f"{start}", part_of(volume, start, stop), **same)
    series = read_ct_series(tmp_path / "study")
    np.testing.assert_array_equal(volume_from_series(series).hu, volume.hu)
    write_rtstruct(tmp_path / "rs.dcm", series, traced(series, hard_labels()))
    assert complaints("dciodvfy", tmp_path / "rs.dcm") == []
    assert len(_series_reference(pydicom.dcmread(tmp_path / "rs.dcm")).ContourImageSequence) == 2
    pytest.importorskip("highdicom")
    with pytest.raises(OutputError, match="SEG cannot refer to an enhanced CT in 2 files"):
        write_seg(tmp_path / "seg.dcm", series, LabelMap(hard_labels(), series.geometry, CATALOGUE))


def test_of_a_concatenation_no_part_may_be_missing(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    same: dict[str, Any] = {
        k: generate_uid() for k in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "ConcatenationUID")
    }
    for number, start in enumerate((0, 4, 8), start=1):
        part: dict[str, Any] = {"InConcatenationNumber": number, "InConcatenationTotalNumber": 3}
        write_enhanced(tmp_path / f"{number}", part_of(volume, start, min(start + 4, 11)), **same, **part)
    assert len(read_ct_series(tmp_path).slices) == SHAPE[0]
    (tmp_path / "3").unlink()  # at the end of the stack no gap would tell
    with pytest.raises(StudyError, match="has 2 of its 3 files"):
        read_ct_series(tmp_path)


def two_stacks(folder: Path) -> tuple[CTVolume, CTVolume]:
    """One file with the lower slices as stack "neck" and the upper ones, of which some are missing between, "head"."""
    volume = random_volume(SHAPE)
    path = write_enhanced(folder / "ct", volume)
    dataset = pydicom.dcmread(path)
    items = list(dataset.PerFrameFunctionalGroupsSequence)
    for k, item in enumerate(items):
        item.FrameContentSequence[0].StackID = "neck" if k < 5 else "head"
        if k >= 5:
            item.PlanePositionSequence[0].ImagePositionPatient[2] += 40
    dataset.save_as(path)
    return part_of(volume, 0, 5), part_of(volume, 5, 11)


def test_of_several_stacks_one_is_chosen(tmp_path: Path) -> None:
    neck, head = two_stacks(tmp_path / "study")
    with pytest.raises(StudyError, match=r"\.\.\..*/neck \(5 slices every 2.5 mm\), \.\.\..*/head \(6 slices") as error:
        read_ct_series(tmp_path / "study")
    assert "--series" in str(error.value)
    uid = pydicom.dcmread(tmp_path / "study" / "ct").SeriesInstanceUID
    with pytest.raises(StudyError, match="2 CT series"):
        read_ct_series(tmp_path / "study", series_instance_uid=uid)
    for stack, volume in (("neck", neck), ("head", head)):
        series = read_ct_series(tmp_path / "study", series_instance_uid=f"{uid[-8:]}/{stack}")
        assert series.series_instance_uid == uid
        np.testing.assert_array_equal(volume_from_series(series).hu, volume.hu)


def test_a_stack_of_a_file_is_referred_to_by_its_frames(tmp_path: Path) -> None:
    two_stacks(tmp_path / "study")
    series = read_ct_series(tmp_path / "study", series_instance_uid="/head")
    write_rtstruct(tmp_path / "rs.dcm", series, traced(series, hard_labels()[:6]))
    (image,) = _series_reference(pydicom.dcmread(tmp_path / "rs.dcm")).ContourImageSequence
    assert list(image.ReferencedFrameNumber) == [6, 7, 8, 9, 10, 11]
    assert (tmp_path / "rs.dcm").read_bytes() == by_pydicom(tmp_path / "rs.dcm")
    assert complaints("dciodvfy", tmp_path / "rs.dcm") == []
    pytest.importorskip("highdicom")
    write_seg(tmp_path / "seg.dcm", series, LabelMap(hard_labels()[:6], series.geometry, CATALOGUE))
    expected = hard_labels()[:6]
    expected[expected == 6] = 5  # there is no fifth structure so low down
    np.testing.assert_array_equal(masks_of_seg(tmp_path / "seg.dcm", series), expected)


def test_localizer_frames_are_passed_over(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "study" / "ct", random_volume(SHAPE))
    dataset = pydicom.dcmread(path)
    cosines = dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    del dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    for k, item in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        across = Dataset()
        across.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
        item.PlaneOrientationSequence = [across] if k == 0 else cosines
    dataset.save_as(path)
    assert [s.frame for s in read_ct_series(path.parent).slices] == list(range(2, 12))


def test_legacy_converted_files_are_read_as_well(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    path = write_enhanced(tmp_path / "ct", volume)
    edit(path, SOPClassUID=LegacyConvertedEnhancedCTImageStorage)
    series = read_ct_series(tmp_path)
    np.testing.assert_array_equal(volume_from_series(series).hu, volume.hu)
    assert {s.sop_class_uid for s in series.slices} == {LegacyConvertedEnhancedCTImageStorage}


def one_frame_twice(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    items = dataset.PerFrameFunctionalGroupsSequence
    items[4].PlanePositionSequence = items[3].PlanePositionSequence
    items[4].FrameContentSequence[0].TemporalPositionIndex = 2
    dataset.save_as(path)


def without_a_frame(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    del dataset.PerFrameFunctionalGroupsSequence[4]
    dataset.NumberOfFrames = 10
    dataset.PixelData = np.delete(_frames(dataset), 4, axis=0).tobytes()
    dataset.save_as(path)


def _frames(dataset: Dataset) -> np.ndarray[Any, Any]:
    return np.frombuffer(dataset.PixelData, "<i2").reshape(-1, dataset.Rows, dataset.Columns)


def cut_pixels(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def deflated(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path)


REFUSALS: dict[str, tuple[Callable[[Path], Any], type[AnatomyNetError], str]] = {
    "missing frame": (without_a_frame, GeometryError, r"missing slices, 1 in all: .*\(ct frame 4\) .*\(ct frame 5\)"),
    "two temporal positions": (one_frame_twice, GeometryError, r"share a position \(2 acquisitions .*ct frame 4"),
    "fewer groups than frames": (lambda p: edit(p, NumberOfFrames=12), StudyError, "12 frames are described by 11"),
    "no groups": (lambda p: edit(p, PerFrameFunctionalGroupsSequence=None), StudyError, "described by 0 per-frame"),
    "no orientation": (
        lambda p: edit(p, SharedFunctionalGroupsSequence=None),
        StudyError,
        "ct frame 1: ImageOrientationPatient is missing",
    ),
    "said twice": (
        lambda p: set_of_each(p, "PixelMeasuresSequence", PixelSpacing=[1, 1]),
        StudyError,
        "frame 1 has one PixelSpacing of its own and another that all frames share",
    ),
    "projection": (
        lambda p: edit_shared(p, "CTImageFrameTypeSequence", VolumeBasedCalculationTechnique="MAX_IP"),
        StudyError,
        "is a reformat .*MAXIP",
    ),
    "reformat": (
        lambda p: edit_shared(p, "CTImageFrameTypeSequence", VolumeBasedCalculationTechnique="MPR"),
        StudyError,
        "is a reformat .*MPR",
    ),
    "tilt": (
        lambda p: set_of_each(p, "CTAcquisitionDetailsSequence", GantryDetectorTilt="7.5"),
        GeometryError,
        "ct frame 1: GantryDetectorTilt is 7.50",
    ),
    "no Hounsfield units": (
        lambda p: edit_shared(p, "PixelValueTransformationSequence", RescaleType="MGML"),
        StudyError,
        "RescaleType is MGML",
    ),
    "cut": (cut_pixels, StudyError, "ct is damaged: expected 38720 bytes of pixels, found 38620"),
    "deflated": (deflated, StudyError, "deflated as a whole"),
}


def edit_shared(path: Path, group: str, **changes: Any) -> None:
    dataset = pydicom.dcmread(path)
    for keyword, value in changes.items():
        setattr(dataset.SharedFunctionalGroupsSequence[0][group][0], keyword, value)
    dataset.save_as(path)


@pytest.mark.parametrize("case", REFUSALS)
def test_what_could_misplace_a_contour_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    damage, error, words = REFUSALS[case]
    path = write_enhanced(tmp_path / "ct", random_volume(SHAPE))
    damage(path)
    with pytest.raises(error, match=words) as refusal:
        read_ct_series(tmp_path)
    assert "\n" not in str(refusal.value)
    assert not any(word in str(refusal.value) for word in words_of_patient())


def test_a_frame_that_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "ct", random_volume((3, 8, 10)))
    compress(path, RLELossless)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([b"\x01\x00\x00\x00" * 20] * 3)
    dataset.save_as(path)
    series: CTSeries = read_ct_series(tmp_path)
    with pytest.raises(StudyError, match=r"slice \d of 3, ct frame \d is damaged: its pixels cannot be decoded"):
        volume_from_series(series)
