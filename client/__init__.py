"""The thin client: DICOM in, RTSTRUCT out.

    from anatomynet.client import segment_study
    result = segment_study("STUDY")

does what `anatomynet-client segment STUDY` does. What a name here needs is imported when the name is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anatomynet.client.cohort import StudyOutcome as StudyOutcome
    from anatomynet.client.cohort import segment_studies as segment_studies
    from anatomynet.client.connection import ServerOptions as ServerOptions
    from anatomynet.client.pipeline import Drawing as Drawing
    from anatomynet.client.pipeline import SegmentedStudy as SegmentedStudy
    from anatomynet.client.pipeline import SegmentOptions as SegmentOptions
    from anatomynet.client.pipeline import segment_study as segment_study

_HOMES = {
    "Drawing": "pipeline",
    "SegmentOptions": "pipeline",
    "SegmentedStudy": "pipeline",
    "ServerOptions": "connection",
    "StudyOutcome": "cohort",
    "segment_studies": "cohort",
    "segment_study": "pipeline",
}

__all__ = [
    "Drawing",
    "SegmentOptions",
    "SegmentedStudy",
    "ServerOptions",
    "StudyOutcome",
    "segment_studies",
    "segment_study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
