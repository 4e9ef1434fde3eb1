"""Reading a study: what is found, and what is refused."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.dataelem import RawDataElement
from pydicom.pixels.decoders.base import get_decoder
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MediaStorageDirectoryStorage,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

from anatomynet.client.ct_writer import write_ct_series
from anatomynet.client.headers import LARGEST_INFLATED_BYTES
from anatomynet.client.study import CTSeries, read_ct_series, volume_from_series
from anatomynet.engine.errors import AnatomyNetError, GeometryError, StudyError
from anatomynet.engine.geometry import Direction
from tests.dicom_studies import (
    DIRECTIONS,
    PATIENT,
    all_directions,
    edit,
    on_grid,
    random_volume,
    words_of_patient,
    write_study,
)

Study = tuple[Path, list[Path]]
LOCALIZER = {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1], "ImagePositionPatient": [-100, 0, 200]}
ORIGIN_TOLERANCE_MM = 1e-5  # of positions written with six decimals


@pytest.fixture
def study(tmp_path: Path) -> Study:
    folder = tmp_path / "study"
    return folder, write_study(folder)


def test_a_folder_that_may_be_listed_and_not_entered_is_refused(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, paths = study

    def is_file(self: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "is_file", is_file)
    with pytest.raises(StudyError, match="cannot be read: Permission denied; check its permissions") as error:
        read_ct_series(folder)
    assert paths[0].name not in str(error.value)


def same_series(found: CTSeries, expected: CTSeries) -> bool:
    uids = [[s.sop_instance_uid for s in series.slices] for series in (found, expected)]
    return uids[0] == uids[1] and found.geometry == expected.geometry


def add_copy(path: Path, target: Path, **changes: object) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)
    edit(target, **{"SOPInstanceUID": generate_uid(), **changes})


# ---- what is found ----


@pytest.mark.parametrize("direction", all_directions(), ids=str)
def test_every_voxel_is_read_back_to_its_place(tmp_path: Path, direction: Direction) -> None:
    volume = random_volume(direction=direction)
    write_ct_series(tmp_path, volume)
    read = volume_from_series(read_ct_series(tmp_path))
    np.testing.assert_array_equal(on_grid(read.hu, read.geometry, volume.geometry), volume.hu)
    if np.linalg.det(direction) > 0:  # slices are sorted along row x column: a left-handed volume comes back turned
        np.testing.assert_array_equal(read.hu, volume.hu)
        np.testing.assert_allclose(read.geometry.affine, volume.geometry.affine, atol=ORIGIN_TOLERANCE_MM)


@pytest.mark.parametrize("position", ["HFS", "HFP", "FFS", "FFP"])
def test_simpleitk_finds_the_same_volume(tmp_path: Path, position: str) -> None:
    write_study(tmp_path, random_volume(direction=DIRECTIONS[position]))
    series = read_ct_series(tmp_path)
    reader: Any = SimpleITK.ImageSeriesReader()  # type: ignore[no-untyped-call]
    reader.SetFileNames([str(s.path) for s in series.slices])
    image = reader.Execute()
    np.testing.assert_array_equal(volume_from_series(series).hu, SimpleITK.GetArrayFromImage(image))
    np.testing.assert_allclose(series.geometry.spacing, image.GetSpacing(), atol=ORIGIN_TOLERANCE_MM)
    np.testing.assert_allclose(series.geometry.origin, image.GetOrigin(), atol=ORIGIN_TOLERANCE_MM)
    np.testing.assert_allclose(np.ravel(series.geometry.direction), image.GetDirection(), atol=1e-6)


def test_slices_stand_in_order_of_position_whatever_the_files_are_called(study: Study) -> None:
    folder, paths = study
    expected = read_ct_series(folder)
    for number, path in enumerate(paths):
        target = folder / f"part {number % 2}" / "deep" / f"{(7 * number) % 11}"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    found = read_ct_series(folder)
    assert same_series(found, expected)
    assert [s.position[2] for s in found.slices] == sorted(s.position[2] for s in found.slices)


def add_other_files(folder: Path, paths: list[Path]) -> None:
    (folder / "notes.txt").write_text("not DICOM")
    (folder / ".trash").mkdir()
    shutil.copy(paths[0], folder / ".trash")
    (folder / "empty.lock").touch()
    (folder / "no suffix").write_bytes(b"\x08\x00" + bytes(300))
    (folder / "._CT0001.dcm").write_bytes(b"what a Mac leaves behind")
    add_copy(paths[0], folder / "mr", SOPClassUID=MRImageStorage, SeriesInstanceUID=generate_uid())
    dicomdir = pydicom.dcmread(paths[0], stop_before_pixels=True)
    dicomdir.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    del dicomdir.SOPClassUID
    dicomdir.save_as(folder / "DICOMDIR")


def add_localizers_that_say_axial(folder: Path, paths: list[Path]) -> None:
    add_copy(paths[0], folder / "scout1", **LOCALIZER)
    add_copy(paths[0], folder / "scout2", **{**LOCALIZER, "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, Rows=4)


def add_localizer_without_a_place(folder: Path, paths: list[Path]) -> None:
    nowhere = {"ImagePositionPatient": None, "ImageOrientationPatient": None}
    add_copy(paths[0], folder / "scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], **nowhere)


def add_scout_series(folder: Path, paths: list[Path]) -> None:
    uid = generate_uid()
    add_copy(paths[0], folder / "scout1", SeriesInstanceUID=uid, **LOCALIZER)
    add_copy(
        paths[0],
        folder / "scout2",
        SeriesInstanceUID=uid,
        **{**LOCALIZER, "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
    )


def add_reformat_series(folder: Path, paths: list[Path]) -> None:
    uid = generate_uid()
    for k, path in enumerate(paths):
        add_copy(path, folder / f"mpr{k}", SeriesInstanceUID=uid, ImageType=["DERIVED", "SECONDARY", "CT_SOM5 MPR"])


@pytest.mark.parametrize(
    "add",
    [
        add_other_files,
        add_localizers_that_say_axial,
        add_localizer_without_a_place,
        add_scout_series,
        add_reformat_series,
    ],
)
def test_what_lies_beside_is_passed_over(study: Study, add: Callable[[Path, list[Path]], None]) -> None:
    folder, paths = study
    expected = read_ct_series(folder)
    add(folder, paths)
    assert same_series(read_ct_series(folder), expected)


def test_series_is_chosen_by_its_uid_or_its_last_digits(study: Study) -> None:
    folder, paths = study
    first = read_ct_series(folder)
    other = generate_uid()
    for k, path in enumerate(paths[:4]):
        add_copy(path, folder / f"other{k}", SeriesInstanceUID=other)
    with pytest.raises(StudyError) as refusal:
        read_ct_series(folder)
    message = str(refusal.value)
    assert f"...{other[-8:]} (4 slices every 2.5 mm)" in message
    assert f"...{first.series_instance_uid[-8:]} (6 slices every 2.5 mm)" in message
    assert "--series" in message
    assert len(read_ct_series(folder, series_instance_uid=other).slices) == 4
    assert same_series(read_ct_series(folder, series_instance_uid=first.series_instance_uid[-8:]), first)
    for unknown in ("0.0", ""):
        with pytest.raises(StudyError, match=r"expected one of .* choose with --series"):
            read_ct_series(folder, series_instance_uid=unknown)


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGLSLossless],
    ids=lambda uid: uid.name,
)
def test_transfer_syntaxes_bring_the_same_volume(study: Study, syntax: UID) -> None:
    folder, paths = study
    expected = volume_from_series(read_ct_series(folder)).hu
    for path in paths:
        dataset = pydicom.dcmread(path)
        if syntax.is_compressed and not syntax.is_deflated:
            dataset.compress(syntax, generate_instance_uid=False)
        elif syntax.is_little_endian:
            dataset.file_meta.TransferSyntaxUID = syntax
        else:
            dataset.PixelData = dataset.pixel_array.astype(">i2").tobytes()
            dataset.file_meta.TransferSyntaxUID = syntax
        fresh = pydicom.Dataset(dict(dataset.items()))
        fresh.file_meta = dataset.file_meta
        fresh.save_as(path, enforce_file_format=True)
    np.testing.assert_array_equal(volume_from_series(read_ct_series(folder)).hu, expected)


@pytest.mark.parametrize("preamble", [True, False])
def test_a_slice_that_inflates_without_end_is_refused(study: Study, preamble: bool) -> None:
    folder, paths = study
    dataset = pydicom.dcmread(paths[0])
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.add_new(Tag(0xFFFC, 0xFFFC), "OB", bytes(LARGEST_INFLATED_BYTES))  # padding, which nobody reads
    dataset.save_as(paths[0], implicit_vr=False, little_endian=True)
    assert paths[0].stat().st_size < LARGEST_INFLATED_BYTES / 900
    if not preamble:
        paths[0].write_bytes(paths[0].read_bytes()[132:])
    with pytest.raises(StudyError, match=r"CT0001.dcm is damaged: it does not inflate to at most 64 MiB"):
        read_ct_series(folder)


def test_files_without_preamble_are_read(study: Study) -> None:
    folder, paths = study
    expected = volume_from_series(read_ct_series(folder)).hu
    for path in paths:
        dataset = pydicom.dcmread(path)
        bare = pydicom.Dataset(dict(dataset.items()))
        bare.save_as(path, implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(volume_from_series(read_ct_series(folder)).hu, expected)


def test_positions_rounded_to_a_tenth_are_even(tmp_path: Path) -> None:
    for k, path in enumerate(write_study(tmp_path)):
        edit(path, ImagePositionPatient=[-100.3, 45.1, round(-312.7 + 0.625 * k, 1)])
    assert read_ct_series(tmp_path).geometry.spacing[2] == pytest.approx(0.625, abs=0.02)


@pytest.mark.parametrize(
    "text",
    [
        r"+1.171875E0\.9765625",
        r"1.171875  \0.9765625 ",
        r" 1171875e-6\9765.625E-4",
        r"01.1718750000000\.97656250000000",
    ],
)
def test_decimals_may_be_written_oddly(study: Study, text: str) -> None:
    folder, paths = study
    expected = read_ct_series(folder).geometry
    for path in paths:
        dataset = pydicom.dcmread(path)
        dataset["PixelSpacing"] = RawDataElement(Tag("PixelSpacing"), "DS", len(text), text.encode(), 0, False, True)
        dataset.save_as(path)
    assert read_ct_series(folder).geometry == expected


@pytest.mark.parametrize("text", [r"1_0\1", r"0x10\1", r"1,5\1", r"1\inf", r"1", r"1\2\3", "\\", "1\\\u0661"])
def test_what_is_no_decimal_is_refused(study: Study, text: str) -> None:
    folder, paths = study
    for path in paths:
        dataset = pydicom.dcmread(path)
        data = text.encode()
        dataset["PixelSpacing"] = RawDataElement(Tag("PixelSpacing"), "DS", len(data), data, 0, False, True)
        dataset.save_as(path)
    with pytest.raises(StudyError, match="PixelSpacing is not 2 finite numbers"):
        read_ct_series(folder)


def test_nothing_of_the_patient_is_shown(study: Study) -> None:
    series = read_ct_series(study[0])
    assert str(series.header.PatientName) == PATIENT["PatientName"]
    assert not any(word in repr(series) for word in words_of_patient())


def test_import_is_light() -> None:
    heavy = "{'torch', 'scipy', 'skimage', 'tritonclient', 'openvino', 'matplotlib'}"
    code = f"import sys, anatomynet.client.study, anatomynet.client.rtstruct; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what is refused ----


def each(**changes: object) -> Callable[[Path, list[Path]], None]:
    def damage(_: Path, paths: list[Path]) -> None:
        for path in paths:
            edit(path, **changes)

    return damage


def third(**changes: object) -> Callable[[Path, list[Path]], None]:
    return lambda _, paths: edit(paths[2], **changes)


def last_has_endless_axes(_: Path, paths: list[Path]) -> None:
    """Their cross product is infinity less infinity."""
    edit(paths[-1], ImageOrientationPatient=["1e200", "1e200", "0", "1e200", "1e200", "0"])


def third_has_fragments_though_its_syntax_has_none(_: Path, paths: list[Path]) -> None:
    """As a PACS may leave it that decompresses: an empty offset table and one fragment."""
    data = paths[2].read_bytes()
    start = data.index(b"\xe0\x7f\x10\x00OW")
    pixels = data[start + 12 :]
    item, end = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0" + bytes(4)
    fragments = item + bytes(4) + item + len(pixels).to_bytes(4, "little") + pixels + end
    paths[2].write_bytes(data[:start] + b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff" + fragments)


def third_has_a_sequence_of_pixels(_: Path, paths: list[Path]) -> None:
    data = paths[2].read_bytes()
    pixels = b"\xe0\x7f\x10\0SQ\0\0\xff\xff\xff\xff\xfe\xff\xdd\xe0\0\0\0\0"
    paths[2].write_bytes(data[: data.index(pixels[:4])] + pixels)


def lose(*numbers: int) -> Callable[[Path, list[Path]], None]:
    def damage(_: Path, paths: list[Path]) -> None:
        for number in numbers:
            paths[number].unlink()

    return damage


def cut(size: int) -> Callable[[Path, list[Path]], None]:
    def damage(_: Path, paths: list[Path]) -> None:
        paths[2].write_bytes(paths[2].read_bytes()[:size])

    return damage


def overwrite_with_zeros(_: Path, paths: list[Path]) -> None:
    paths[2].write_bytes(bytes(999))


def shear(_: Path, paths: list[Path]) -> None:
    for k, path in enumerate(paths):
        edit(path, ImagePositionPatient=[-100.3, 45.123 + 0.1 * k, -312.7 + 2.5 * k])


def tilt(_: Path, paths: list[Path]) -> None:
    cosine, sine = float(np.cos(0.2)), float(np.sin(0.2))
    for path in paths:
        edit(path, ImageOrientationPatient=[1, 0, 0, 0, round(cosine, 6), round(sine, 6)])


def interleave(_: Path, paths: list[Path]) -> None:
    for k, path in enumerate(paths):
        edit(path, ImagePositionPatient=[-100.3, 45.123, -312.7 + 2.5 * (k // 2)], AcquisitionNumber=k % 2)


def stretch(_: Path, paths: list[Path]) -> None:
    for k, path in enumerate(paths):
        edit(path, ImagePositionPatient=[-100.3, 45.123, -312.7 + (2.5 * k if k < 3 else 7.5 + 3.3 * (k - 3))])


def copy_a_slice(folder: Path, paths: list[Path]) -> None:
    (folder / "again").mkdir()
    shutil.copy(paths[3], folder / "again" / "same.dcm")


def third_is_mr_by_its_image_alone(_: Path, paths: list[Path]) -> None:
    dataset = pydicom.dcmread(paths[2])
    dataset.SOPClassUID = MRImageStorage
    dataset.save_as(paths[2])


def two_stacks_in_one(folder: Path, paths: list[Path]) -> None:
    for k in range(12):
        add_copy(paths[0], folder / f"b{k}", **LOCALIZER)
    for k in range(14):
        add_copy(paths[0], folder / f"c{k}")


MISSING = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "FrameOfReferenceUID"]
MISSING += ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "RescaleSlope", "RescaleIntercept"]
MISSING += ["BitsStored", "PixelRepresentation", "PhotometricInterpretation"]
REFUSALS: dict[str, tuple[Callable[[Path, list[Path]], None], type[AnatomyNetError], str]] = {
    "missing slice": (lose(2), GeometryError, r"missing slices, 1 in all: between z = -310.20 .* -305.20"),
    "missing slices": (lose(2, 3), GeometryError, r"missing slices, 2 in all: .*every 2.5 mm"),
    "uneven spacing": (stretch, GeometryError, r"uneven spacing, 2.5 to 3.3 mm: between z = "),
    "two acquisitions": (interleave, GeometryError, r"share a position \(2 acquisitions in one series\): between z"),
    "a slice twice": (copy_a_slice, StudyError, r"there twice: .*CT0004.dcm.*same.dcm"),
    "sheared": (shear, GeometryError, r"drift sideways by 0.50 mm .*gantry tilt of about 2.3 degrees"),
    "tilted": (tilt, GeometryError, r"oblique|drift"),
    "tilt in the header": (each(GantryDetectorTilt=12.5), GeometryError, r"GantryDetectorTilt is 12.50"),
    "other size": (third(Rows=4), GeometryError, r"differ in Rows: 8 and 4 .*CT0003"),
    "other spacing": (third(PixelSpacing=[1, 1]), GeometryError, r"differ in PixelSpacing"),
    "turned": (third(ImageOrientationPatient=[-1, 0, 0, 0, -1, 0]), GeometryError, r"differ in ImageOrientation"),
    "other frame of reference": (third(FrameOfReferenceUID="1.2.3"), GeometryError, r"differ in FrameOfReference"),
    "other patient": (third(PatientID="PID4711b"), GeometryError, r"differ in PatientID \("),
    "other study": (third(StudyInstanceUID="1.2.3"), GeometryError, r"differ in StudyInstanceUID \("),
    "not at right angles": (each(ImageOrientationPatient=[1, 0, 0, 0.5, 0.9, 0]), GeometryError, r"right angles"),
    "axes without a cross product": (
        last_has_endless_axes,
        GeometryError,
        r"CT0006.dcm: ImageOrientation.*right angles",
    ),
    "position no number": (third(ImagePositionPatient=[1, 2]), StudyError, r"ImagePositionPatient is not 3 finite"),
    "two stacks": (two_stacks_in_one, GeometryError, r"20 slices of one orientation and 12 of another"),
    "one slice": (lose(0, 1, 2, 3, 4), StudyError, r"single slice"),
    "no slice": (lose(0, 1, 2, 3, 4, 5), StudyError, r"no CT slices in .*: found nothing"),
    "localizers only": (
        each(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], ImagePositionPatient=None),
        StudyError,
        r"holds only localizers",
    ),
    "reformat": (each(ImageType=["DERIVED", "SECONDARY", "REFORMATTED"]), StudyError, r"is a reformat"),
    "projection": (each(ImageType=["DERIVED", "SECONDARY", "AXIAL", "MIP"]), StudyError, r"is a reformat .*MIP"),
    "MR": (each(SOPClassUID=MRImageStorage), StudyError, r"found 6 x MR Image Storage"),
    "enhanced CT": (each(SOPClassUID=EnhancedCTImageStorage), StudyError, r"CT0001.dcm: 0 frames are described by 0"),
    "a class that is no UID": (
        each(SOPClassUID="1.2\n" + PATIENT["PatientID"]),
        StudyError,
        "found 6 x unreadable class",
    ),
    "cut in the pixels": (cut(-10), StudyError, r"CT0003.dcm is damaged: expected 160 bytes of pixels, found 150"),
    "cut before the pixels": (cut(-175), StudyError, r"CT0003.dcm is damaged: it ends before its pixels"),
    "pixels in a sequence": (
        third_has_a_sequence_of_pixels,
        StudyError,
        r"CT0003.dcm is damaged: its pixels are a seq",
    ),
    "fragments, though its syntax has none": (
        third_has_fragments_though_its_syntax_has_none,
        StudyError,
        r"CT0003.dcm is damaged: its pixels lie in fragments.*1\.2\.840\.10008\.1\.2\.1",
    ),
    "cut in the header": (cut(300), StudyError, r"CT0003.dcm is damaged"),
    "empty file": (cut(0), StudyError, r"CT0003.dcm is damaged: it is empty"),
    "not DICOM": (overwrite_with_zeros, StudyError, r"CT0003.dcm is damaged: its header cannot be read"),
    "CT and not": (third_is_mr_by_its_image_alone, StudyError, r"CT0003.dcm is damaged: it says both"),
    "colour": (each(PhotometricInterpretation="RGB"), StudyError, r"PhotometricInterpretation is RGB"),
    "a photometric interpretation that is no word": (
        each(PhotometricInterpretation="MONO\nMeier^Secret"),
        StudyError,
        r"PhotometricInterpretation is unreadable, expected MONOCHROME2",
    ),
    "8 bits": (each(BitsAllocated=8), StudyError, r"BitsAllocated is 8, expected 16"),
    "values in the upper bits": (each(BitsStored=12), StudyError, r"HighBit is 15, expected 11"),
    "frames": (each(NumberOfFrames=2), StudyError, r"NumberOfFrames is 2, expected 1"),
    "no Hounsfield units": (each(RescaleType="MGML"), StudyError, r"RescaleType is MGML, expected HU"),
    "slope 0": (third(RescaleSlope=0), StudyError, r"RescaleSlope is not above zero"),
    "slope not finite": (third(RescaleSlope="nan"), StudyError, r"RescaleSlope is not 1 finite number"),
    **{f"no {tag}": (third(**{tag: None}), StudyError, f"CT0003.dcm: {tag} is missing") for tag in MISSING},
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of the invalid values that the tests write
@pytest.mark.parametrize("case", REFUSALS)
def test_what_could_misplace_a_contour_is_refused_in_one_line(study: Study, case: str) -> None:
    folder, paths = study
    damage, error, words = REFUSALS[case]
    damage(folder, paths)
    with pytest.raises(error, match=words) as refusal:
        read_ct_series(folder)
    message = str(refusal.value)
    assert "\n" not in message
    assert not any(word in message for word in words_of_patient())


def test_folder_that_is_none_is_refused(study: Study) -> None:
    folder, paths = study
    with pytest.raises(StudyError, match="does not exist"):
        read_ct_series(folder / "nowhere")
    with pytest.raises(StudyError, match="is a file"):
        read_ct_series(paths[0])


def test_a_slice_cut_anywhere_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    paths = write_study(folder, random_volume(shape=(3, 2, 2)))
    whole = paths[2].read_bytes()
    for size in range(len(whole)):
        paths[2].write_bytes(whole[:size])
        with pytest.raises(StudyError, match=r"CT0003.dcm"):
            read_ct_series(folder)


@pytest.mark.parametrize(
    ("index", "element", "kind", "message"),
    [
        # MediaStorageSOPClassUID, of the file meta header, as a type that nobody knows
        (2, b"\x02\x00\x02\x00UI", b"ZZ", "CT0003.dcm is damaged"),
        (0, b"\x08\x00\x50\x00SH", b"CH", "CT0001.dcm is damaged: AccessionNumber is of a wrong type"),
    ],
)
def test_an_attribute_of_a_wrong_type_is_refused(
    study: Study, index: int, element: bytes, kind: bytes, message: str
) -> None:
    folder, paths = study
    data = paths[index].read_bytes()
    place = data.index(element) + len(element) - len(kind)
    paths[index].write_bytes(data[:place] + kind + data[place + len(kind) :])
    with pytest.raises(StudyError, match=message):
        read_ct_series(folder)


def test_a_slice_that_was_cut_since_is_refused(study: Study) -> None:
    folder, paths = study
    series = read_ct_series(folder)
    paths[2].write_bytes(paths[2].read_bytes()[:-2])
    with pytest.raises(StudyError, match=r"CT0003.dcm is damaged: expected 160 bytes of pixels, found 158"):
        volume_from_series(series)
    paths[2].unlink()
    with pytest.raises(StudyError, match=r"CT0003.dcm cannot be read"):
        volume_from_series(series)


@pytest.mark.parametrize(("syntax", "advice"), [(JPEGLosslessSV1, "python-gdcm"), ("1.2.3.4", "uncompressed")])
def test_a_codec_that_is_missing_is_named(study: Study, syntax: str, advice: str) -> None:
    if syntax == JPEGLosslessSV1 and get_decoder(JPEGLosslessSV1).is_available:
        pytest.skip("a decoder for lossless JPEG is installed")
    folder, paths = study
    for path in paths:
        dataset = pydicom.dcmread(path)
        dataset.PixelData = pydicom.encaps.encapsulate([dataset.PixelData])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = UID(syntax)
        dataset.save_as(path, implicit_vr=False, little_endian=True)
    series = read_ct_series(folder)
    with pytest.raises(StudyError, match=rf"no decoder is installed: .*{advice}"):
        volume_from_series(series)


def test_compressed_pixels_that_are_damaged_are_refused(study: Study) -> None:
    folder, paths = study
    for path in paths:
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless, generate_instance_uid=False)
        if path == paths[2]:
            dataset.PixelData = pydicom.encaps.encapsulate([b"\x01\x00\x00\x00" * 20])
        dataset.save_as(path)
    with pytest.raises(StudyError, match=r"CT0003.dcm is damaged: its pixels cannot be decoded"):
        volume_from_series(read_ct_series(folder))


def test_sop_class_is_of_a_ct(study: Study) -> None:
    assert {s.sop_class_uid for s in read_ct_series(study[0]).slices} == {CTImageStorage}
