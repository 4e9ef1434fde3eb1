"""Which elements are wanted of a CT file's header, and what is kept of one: the file's own bytes."""

from collections.abc import Mapping
from typing import NamedTuple

from pydicom.dataelem import DataElement, RawDataElement
from pydicom.tag import Tag

# Copied into an RTSTRUCT as they stand (PS3.3 C.7.1.1, C.7.2.1, C.7.4.1), never logged.
PATIENT_AND_STUDY_KEYWORDS = (
    "SpecificCharacterSet",
    "TimezoneOffsetFromUTC",
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "QualityControlSubject",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "StudyDescription",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
)
IMAGE_KEYWORDS = (
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "AcquisitionNumber",
    "GantryDetectorTilt",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelSpacing",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "PixelData",
)
TAGS = {keyword: Tag(keyword) for keyword in (*PATIENT_AND_STUDY_KEYWORDS, *IMAGE_KEYWORDS)}
# Of the file before its own header (PS3.10 7.1), and where that begins, after "DICM".
PREAMBLE_LENGTH = 128
META_START = PREAMBLE_LENGTH + 4
# A header has no longer value than this but the pixels, which stay on disk until they are asked for.
LONGEST_HEADER_VALUE = 65536
UNDEFINED_LENGTH = 0xFFFFFFFF  # of what ends where a delimiter stands (PS3.5 7.1)


class FileElements(NamedTuple):
    """What is kept of a file's header.

    Attributes:
        by_keyword: the elements of TAGS that the file has; raw, but for what pydicom converts as it reads: sequences of
            undefined length, the character set.
        media_class_uid: what the file is as its own header (PS3.10) says, empty where it does not.
        transfer_syntax_uid: how the file is encoded.
        little_endian: whether its numbers are.
    """

    by_keyword: Mapping[str, RawDataElement | DataElement]
    media_class_uid: str
    transfer_syntax_uid: str
    little_endian: bool = True
