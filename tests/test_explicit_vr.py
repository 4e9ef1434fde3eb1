"""What is encoded here is, byte for byte, what pydicom writes of the same datasets."""

import warnings
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage
from pydicom.valuerep import VR
from pydicom.values import converters

from anatomynet.client.explicit_vr import encoded, put_encoded_sequences

ODD_UID, EVEN_UID = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.20"
IMAGE = {"ReferencedSOPClassUID": ODD_UID, "ReferencedSOPInstanceUID": EVEN_UID}
FRAMES = {**IMAGE, "ReferencedFrameNumber": [1, 2, 10]}
CONTOUR = {
    "ContourImageSequence": [IMAGE],
    "ContourGeometricType": "CLOSED_PLANAR",
    "NumberOfContourPoints": 3,
    "ContourNumber": 10,
    "ContourData": "1\\2\\3\\-4.5\\5\\6\\7\\8.125\\9",
}
DATASETS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "UIDs of odd and even length": IMAGE,
    "text of odd and even length": {"ContourGeometricType": "CLOSED_PLANAR", "Modality": "CT"},
    "numbers of odd and even length": {"ContourNumber": 7, "NumberOfContourPoints": 10},
    "several values": {"ROIDisplayColor": [255, 0, 17], "ReferencedFrameNumber": [1, 2], "ImageType": ["A", "BC"]},
    "empty values": {"FrameOfReferenceUID": "", "ContourGeometricType": "", "ContourData": ""},
    "a frame": {**IMAGE, "ReferencedFrameNumber": [3]},
    "the longest text of its VR": {"ContourData": "1" * 65534},
    "one byte more": {"ContourData": "1" * 65535},
    "a long contour": {"ContourData": "\\".join(["-123.456"] * 9001)},
    "many frames": {"ReferencedFrameNumber": list(range(1, 20000))},
    "a contour": CONTOUR,
    "elements out of order": dict(reversed(CONTOUR.items())),
    "no items": {"ContourSequence": [], "ReferencedROINumber": 1},
    "an empty item": {"ContourSequence": [{}, CONTOUR, {}]},
    "sequences in sequences": {
        "FrameOfReferenceUID": EVEN_UID,
        "RTReferencedStudySequence": [
            {**IMAGE, "RTReferencedSeriesSequence": [{"ContourImageSequence": [IMAGE, FRAMES, IMAGE]}]}
        ],
    },
    "what is longer than 64 KiB in a sequence": {"ContourSequence": [CONTOUR, {"ContourData": "1" * 70001}, CONTOUR]},
}


def by_us(values: Mapping[str, Any]) -> bytes:
    return encoded(**{k: [by_us(item) for item in v] if k.endswith("Sequence") else v for k, v in values.items()})


def pydicom_dataset(values: Mapping[str, Any]) -> Dataset:
    dataset = Dataset()
    for keyword, value in values.items():
        is_sequence = keyword.endswith("Sequence")
        setattr(dataset, keyword, [pydicom_dataset(item) for item in value] if is_sequence else value)
    return dataset


def by_pydicom(values: Mapping[str, Any]) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = False, True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are too long
        write_dataset(buffer, pydicom_dataset(values))
    content: bytes = buffer.getvalue()
    return content


@pytest.mark.parametrize("name", DATASETS)
def test_pydicom_writes_the_same(name: str) -> None:
    assert by_us(DATASETS[name]) == by_pydicom(DATASETS[name])


def test_the_uids_are_of_odd_and_even_length() -> None:
    assert (len(ODD_UID) % 2, len(EVEN_UID) % 2) == (1, 0)


def test_what_is_none_is_left_out() -> None:
    assert encoded(ContourNumber=None, NumberOfContourPoints=3) == encoded(NumberOfContourPoints=3)


@pytest.mark.parametrize(("keyword", "message"), [("ROIName", "ROIName is of VR LO"), ("Nonsense", "Nonsense")])
def test_what_cannot_be_encoded_is_refused(keyword: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(**{keyword: "x"})


def rtstruct(charset: str | list[str] | None) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = RTStructureSetStorage, EVEN_UID
    if charset is not None:
        dataset.SpecificCharacterSet = charset
    dataset.PatientName, dataset.ApprovalStatus = "Meier", "UNAPPROVED"
    dataset.StructureSetROISequence = [pydicom_dataset({"ROINumber": 1, "ROIName": "Brain"})]
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def file_of(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("charset", [None, "", "ISO_IR 192", "ISO_IR 100", ["", "ISO 2022 IR 87"], "GB18030"], ids=str)
def test_pydicom_puts_encoded_sequences_into_a_file_unread(
    charset: str | list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    roi = {"ROIDisplayColor": [1, 2, 3], "ContourSequence": [CONTOUR, CONTOUR], "ReferencedROINumber": 1}
    whole, ours = rtstruct(charset), rtstruct(charset)
    whole.ROIContourSequence = [pydicom_dataset(roi), pydicom_dataset(roi)]
    whole.ReferencedFrameOfReferenceSequence = [pydicom_dataset(IMAGE)]
    readers: dict[VR, object] = converters
    monkeypatch.setitem(readers, VR.SQ, None)  # a sequence that is read would fail
    put_encoded_sequences(ours, ROIContourSequence=[by_us(roi)] * 2, ReferencedFrameOfReferenceSequence=[by_us(IMAGE)])
    assert file_of(ours) == file_of(whole)
