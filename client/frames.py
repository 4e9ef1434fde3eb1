"""Enhanced CT file -> a header of each of its frames, as if each were a file of its own (PS3.3 A.38, C.7.6.16).

What a classic CT slice says of itself, an enhanced CT says in functional groups, once for all frames or once for each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NoReturn

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from anatomynet.client.headers import DAMAGED, CTHeader, uid_tail
from anatomynet.engine.errors import StudyError

# Functional group -> what it says of a frame (PS3.3 C.7.6.16.2, C.8.15.3).
GROUPS = {
    "PixelMeasuresSequence": ("PixelSpacing",),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelValueTransformationSequence": ("RescaleIntercept", "RescaleSlope", "RescaleType"),
    "CTAcquisitionDetailsSequence": ("GantryDetectorTilt",),
    "CTImageFrameTypeSequence": ("FrameType", "VolumetricProperties", "VolumeBasedCalculationTechnique"),
    "FrameContentSequence": ("StackID", "FrameAcquisitionNumber", "TemporalPositionIndex"),
}
SHARED, PER_FRAME = Tag("SharedFunctionalGroupsSequence"), Tag("PerFrameFunctionalGroupsSequence")
CONCATENATION = ("ConcatenationUID", "InConcatenationNumber", "InConcatenationTotalNumber")


def frame_headers(header: CTHeader) -> list[CTHeader]:
    """A header of each frame of an enhanced CT file, in the file's order.

    Raises:
        StudyError: functional groups that are missing, damaged, or say two things of one frame.
    """
    try:
        return list(_frame_headers(header))
    except OSError as error:
        raise StudyError(f"{header.path.name} cannot be read: {error.strerror or error}") from error
    except DAMAGED as error:
        raise StudyError(
            f"{header.path.name} is damaged: its functional groups cannot be read; export the series again"
        ) from error


def _frame_headers(header: CTHeader) -> Iterator[CTHeader]:
    """Reads the groups, which the first pass over all files leaves out."""
    wanted = [SHARED, PER_FRAME, *map(Tag, CONCATENATION)]
    dataset = pydicom.dcmread(header.path, specific_tags=wanted, stop_before_pixels=True, force=True)
    shared_items = _items(header, dataset, SHARED)
    items = _items(header, dataset, PER_FRAME)
    count = int(header.text("NumberOfFrames") or 0)
    if not items or len(items) != count or len(shared_items) > 1:
        _refuse(header, f"{count} frames are described by {len(items)} per-frame and {len(shared_items)} shared groups")
    shared = _values(header, shared_items[0]) if shared_items else {}
    part = tuple(str(dataset.get(keyword) or "") for keyword in CONCATENATION)
    for number, item in enumerate(items, start=1):
        own = _values(header, item)
        twice = sorted(keyword for keyword in own.keys() & shared.keys() if own[keyword] != shared[keyword])
        if twice:
            _refuse(header, f"frame {number} has one {twice[0]} of its own and another that all frames share")
        yield replace(header, frame=number, of_frame=_as_slice(shared | own), part=part)


def _items(header: CTHeader, dataset: Dataset, tag: int) -> list[Dataset]:
    if tag not in dataset:
        return []
    element = dataset[tag]
    if element.VR != "SQ":
        _refuse(header, f"{element.keyword} is no sequence")
    return list(element.value or ())


def _values(header: CTHeader, groups: Dataset) -> dict[str, bytes]:
    """Elements of GROUPS as the file's bytes; numbers that are not text as text."""
    found: dict[str, bytes] = {}
    for group, keywords in GROUPS.items():
        items = _items(header, groups, Tag(group))
        if len(items) > 1:
            _refuse(header, f"{group} has {len(items)} items, expected one")
        for item in items:
            for keyword in keywords:
                element = item.get_item(Tag(keyword)) if Tag(keyword) in item else None
                if isinstance(element, RawDataElement) and element.value:
                    binary = keyword in ("FrameAcquisitionNumber", "TemporalPositionIndex")
                    found[keyword] = str(item[keyword].value).encode() if binary else element.value
    return found


def _as_slice(values: dict[str, bytes]) -> dict[str, bytes]:
    """What a classic slice would say; empty where the frame does not say it: its file's own elements don't count."""
    words = (values.pop("FrameType", b""), values.pop("VolumetricProperties", b""))
    technique = values.pop("VolumeBasedCalculationTechnique", b"").replace(b"_", b"")  # MAX_IP is a classic's MAXIP
    acquisition = (values.pop("FrameAcquisitionNumber", b""), values.pop("TemporalPositionIndex", b""))
    absent = dict.fromkeys((keyword for keywords in GROUPS.values() for keyword in keywords), b"")
    return absent | values | {"ImageType": b"\\".join((*words, technique)), "AcquisitionNumber": b" ".join(acquisition)}


def check_parts(headers: Iterable[CTHeader]) -> None:
    """Refuse frames that were cut into several files of which one is not there (PS3.3 C.7.6.16.2.2.4).

    Raises:
        StudyError: a part is missing.
    """
    numbers: dict[tuple[str, str], set[str]] = {}
    for header in headers:
        if header.part and header.part[0] and header.part[2]:
            numbers.setdefault((header.part[0], header.part[2]), set()).add(header.part[1])
    for (uid, total), found in numbers.items():
        if str(len(found)) != total:
            raise StudyError(
                f"concatenation {uid_tail(uid)} has {len(found)} of its {total} files; export the whole series again"
            )


def _refuse(header: CTHeader, problem: str) -> NoReturn:
    raise StudyError(f"{header.path.name}: {problem}; export the series again")
