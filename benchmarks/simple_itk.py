"""SimpleITK and rt-utils as their users read a study and write contours: what benchmarks hold our own against."""

import importlib.util
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.volume import CTVolume, LabelMap


def read_with_simple_itk(study: Path) -> CTVolume:
    """The one series of a folder, by GDCM's sorted names and ImageSeriesReader."""
    import SimpleITK  # its calls are not typed

    itk: Any = SimpleITK
    reader = itk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(study)))
    image = reader.Execute()
    width, height, depth = image.GetSize()
    a, b, c, d, e, f, g, h, i = image.GetDirection()
    geometry = VolumeGeometry(
        (depth, height, width), image.GetSpacing(), image.GetOrigin(), ((a, b, c), (d, e, f), (g, h, i))
    )
    return CTVolume(itk.GetArrayFromImage(image).astype(np.int16, copy=False), geometry)


def has_rt_utils() -> bool:
    """Whether rt-utils is there. It is in no extra of this project, for what it brings along: a build of OpenCV with Qt
    and FFmpeg, and a dataclasses of Python 3.6."""
    return importlib.util.find_spec("rt_utils") is not None


def write_with_rt_utils(path: Path, study: Path, label_map: LabelMap) -> None:
    """Every structure that was found, as its README shows it."""
    from rt_utils import RTStructBuilder

    builder = RTStructBuilder.create_new(dicom_series_path=str(study))
    for label, structure in enumerate(label_map.structures, start=1):
        mask = label_map.labels == label
        if mask.any():
            builder.add_roi(mask=np.moveaxis(mask, 0, -1), color=list(structure.colour), name=structure.tg263_name)
    with redirect_stdout(StringIO()):  # it tells which file it writes
        builder.save(str(path))
