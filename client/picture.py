"""Pictures of label maps on their CT: planes through what was drawn, framed with a legend. A glance, not a review."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.output import write_whole
from anatomynet.engine.preprocess import canonical_from_array, resample_linear
from anatomynet.engine.volume import CTVolume, LabelArray, LabelMap

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

WINDOW = (-160, 240)  # soft tissue, HU
PANEL_HEIGHT = 420  # pixels
MARGIN = 8
LEGEND_WIDTH = 150
LINE_HEIGHT = 20
BACKGROUND = (16, 16, 20)
TEXT = (220, 220, 225)
TINT = 0.25  # of the colour inside a contour
SURROUNDINGS_MM = 40  # of the patient, shown around what was drawn

Colour = tuple[int, int, int]
Box = tuple[slice, slice, slice]
Image = NDArray[np.uint8]
LegendLine = tuple[Colour | None, str]


@dataclass(frozen=True, eq=False)
class Scene:
    """A CT to paint labels on, turned to canonical axes. Patient's right on the left, head up: radiological convention.

    Attributes:
        hu: int16 (z, y, x).
        sides: mm of a voxel (z, y, x).
        colours: float32 (labels + 1, 3), of the background first.
        tint: share of the colour inside a contour.
        box: what of it is shown, (z, y, x).
    """

    hu: NDArray[np.int16]
    sides: tuple[float, float, float]
    colours: NDArray[np.float32]
    tint: float
    box: Box

    def panel(self, labels: LabelArray, axis: int, index: int) -> Image:
        """RGB of PANEL_HEIGHT rows, square pixels: the plane `index` across `axis`, labels (z, y, x) painted on it."""
        rows, columns = (self.box[a] for a in range(3) if a != axis)
        hu, drawn = (np.moveaxis(array, axis, 0)[index, rows, columns] for array in (self.hu, labels))
        if axis != 0:
            hu, drawn = hu[::-1], drawn[::-1]
        sides = [side for a, side in enumerate(self.sides) if a != axis]
        height, width = (count * side for count, side in zip(hu.shape, sides, strict=True))
        shape = (PANEL_HEIGHT, round(PANEL_HEIGHT * width / height))
        grey = resample_linear(hu[None], (1, *shape))[0].clip(*WINDOW)
        y, x = (np.arange(new) * old // new for new, old in zip(shape, hu.shape, strict=True))
        drawn = drawn[y[:, None], x]
        return self._painted((grey - WINDOW[0]) / (WINDOW[1] - WINDOW[0]) * 255, drawn)

    def _painted(self, grey: NDArray[np.float32], drawn: LabelArray) -> Image:
        image = np.repeat(grey[..., None], 3, axis=-1)
        inside = drawn > 0
        image[inside] = (1 - self.tint) * image[inside] + self.tint * self.colours[drawn[inside]]
        border = np.zeros_like(inside)
        border[:-1] |= drawn[:-1] != drawn[1:]
        border[:, :-1] |= drawn[:, :-1] != drawn[:, 1:]
        line = np.maximum(drawn, np.maximum(np.roll(drawn, -1, 0), np.roll(drawn, -1, 1)))
        image[border] = self.colours[line[border]]
        return image.astype(np.uint8)


def scene_from_volume(volume: CTVolume, drawn: LabelArray, colours: Sequence[Colour], *, tint: float = TINT) -> Scene:
    """The scene of a CT, cut to SURROUNDINGS_MM around what was drawn; colours[i] is painted for label i + 1.

    Args:
        volume: the CT.
        drawn: uint8 (z, y, x) on canonical axes, what shall be in sight; the whole CT where nothing is.
        colours: of the labels.
        tint: share of the colour inside a contour.

    Raises:
        GeometryError: an oblique volume.
    """
    hu = canonical_from_array(volume.hu, volume.geometry)
    x, y, z = volume.geometry.canonical().spacing
    palette = np.array([BACKGROUND, *colours], dtype=np.float32)
    return Scene(hu, (z, y, x), palette, tint, _surroundings(drawn, (z, y, x)))


def write_picture(path: Path, volume: CTVolume, label_map: LabelMap, *, overwrite: bool = False) -> None:
    """Writes a PNG: axial, coronal and sagittal plane, each through the most structures, and a legend.

    Raises:
        GeometryError: an oblique volume.
        OutputError: a file that exists, or cannot be written.
    """
    labels = canonical_from_array(label_map.labels, label_map.geometry)
    scene = scene_from_volume(volume, labels, [s.colour for s in label_map.structures])
    panels = [scene.panel(labels, axis, telling_plane(labels, axis)) for axis in range(3)]
    present = set(np.unique(labels).tolist())
    legend: list[LegendLine] = [
        (s.colour, s.tg263_name) if label in present else (None, f"{s.tg263_name} (none)")
        for label, s in enumerate(label_map.structures, start=1)
    ]
    write_png(path, framed([panels], legend), overwrite=overwrite)


def telling_plane(labels: LabelArray, axis: int) -> int:
    """The plane across `axis` that shows the most structures, then the most of them; the middle one if none."""
    present = np.unique(labels)[1:]
    others = tuple(a for a in range(3) if a != axis)
    areas = np.array([np.count_nonzero(labels == label, axis=others) for label in present]).reshape(len(present), -1)
    if not areas.size:
        return labels.shape[axis] // 2
    share = areas / areas.max(axis=1, keepdims=True)
    return int(np.argmax((share > 0).sum(axis=0) + share.mean(axis=0)))


def _surroundings(drawn: LabelArray, sides: tuple[float, float, float]) -> Box:
    plane = drawn.any(axis=0)
    found = [np.flatnonzero(v) for v in (drawn.any(axis=(1, 2)), plane.any(axis=1), plane.any(axis=0))]
    margins = [math.ceil(SURROUNDINGS_MM / side) for side in sides]
    z, y, x = (
        slice(max(0, int(where[0]) - margin), int(where[-1]) + 1 + margin) if where.size else slice(None)
        for where, margin in zip(found, margins, strict=True)
    )
    return z, y, x


def framed(rows: Sequence[Sequence[Image]], legend: Sequence[LegendLine]) -> "PillowImage":
    """Panels in rows, and a legend at the right."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    width = max(sum(panel.shape[1] + MARGIN for panel in row) for row in rows)
    height = max(len(rows) * (PANEL_HEIGHT + MARGIN), len(legend) * LINE_HEIGHT + MARGIN) + MARGIN
    canvas = Pillow.new("RGB", (width + MARGIN + LEGEND_WIDTH, height), BACKGROUND)
    for number, row in enumerate(rows):
        x = MARGIN
        for panel in row:
            canvas.paste(Pillow.fromarray(panel), (x, MARGIN + number * (PANEL_HEIGHT + MARGIN)))
            x += panel.shape[1] + MARGIN
    draw = ImageDraw.Draw(canvas)
    for line, (colour, text) in enumerate(legend):
        x, y = width + MARGIN, MARGIN + line * LINE_HEIGHT
        if colour:
            draw.rectangle((x, y + 3, x + 10, y + 13), fill=colour)
        draw.text((x + 16, y + 2), text, fill=TEXT)
    return canvas


def write_png(path: Path, image: "PillowImage", *, overwrite: bool = False) -> None:
    """Writes a picture.

    Raises:
        OutputError: a file that exists, or cannot be written.
    """
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    write_whole(path, buffer.getvalue(), overwrite=overwrite)
