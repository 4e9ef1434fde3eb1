"""Every error a user can meet, as one tree.

AnatomyNetError            one clear line: what was found, what was expected, which file or UID, what to do
├── StudyError             a DICOM study that cannot be read, or that is not safe to contour
├── GeometryError          a grid on which contours could land in the wrong place
├── DataError              a training case, or a folder of them, that cannot be used
├── ModelError             a configuration, checkpoint or ONNX file that does not fit
├── ExportError            a model that could not be exported
│   └── ParityError        an exported model that does not draw what its checkpoint draws
├── ServerError            a Triton server that is not there, not ready, or failed
│   └── ServerBusyError    a Triton server whose queue is full: try again later
├── NodeError              a DICOM node that is configured wrongly, or whose spool cannot be used
└── OutputError            a result that could not be written

The commands print the message and leave with exit status 1; the message never names a patient.
"""


class AnatomyNetError(Exception):
    """Base of every error that the user can mend."""


class StudyError(AnatomyNetError):
    """A DICOM study that cannot be read, or that is not safe to contour."""


class GeometryError(AnatomyNetError):
    """A grid on which contours could land in the wrong place."""


class DataError(AnatomyNetError):
    """A training case, or a folder of them, that cannot be used."""


class ModelError(AnatomyNetError):
    """A configuration, checkpoint or ONNX file that does not fit."""


class ExportError(AnatomyNetError):
    """A model that could not be exported."""


class ParityError(ExportError):
    """An exported model that does not draw what its checkpoint draws."""


class ServerError(AnatomyNetError):
    """A Triton server that is not there, not ready, or failed."""


class ServerBusyError(ServerError):
    """A Triton server whose queue is full: try again later."""


class NodeError(AnatomyNetError):
    """A DICOM node that is configured wrongly, or whose spool cannot be used."""


class OutputError(AnatomyNetError):
    """A result that could not be written."""
