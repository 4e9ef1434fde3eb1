"""A picture of a LabelMap on its CT: one plane each way through what was drawn. A glance, not a review."""

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anatomynet.client.output import write_whole
from anatomynet.engine.preprocess import canonical_from_array, resample_linear
from anatomynet.engine.volume import CTVolume, LabelMap

WINDOW = (-160, 240)  # soft tissue, HU
PANEL_HEIGHT = 420  # pixels
MARGIN = 8
LEGEND_WIDTH = 150
LINE_HEIGHT = 20
BACKGROUND = (16, 16, 20)
TEXT = (220, 220, 225)
TINT = 0.25  # of the colour inside a contour

Image = NDArray[np.uint8]


def write_picture(path: Path, volume: CTVolume, label_map: LabelMap, *, overwrite: bool = False) -> None:
    """Writes a PNG: axial, coronal and sagittal plane, each through the most structures, and a legend.

    The patient's right is on the picture's left, the head up: the radiological convention.

    Raises:
        GeometryError: an oblique volume.
        OutputError: a file that exists, or cannot be written.
    """
    hu = canonical_from_array(volume.hu, volume.geometry)
    labels = canonical_from_array(label_map.labels, label_map.geometry)
    spacing_zyx = volume.geometry.canonical().spacing[::-1]
    colours = np.array([BACKGROUND, *(s.colour for s in label_map.structures)], dtype=np.float32)
    panels = []
    for axis in range(3):
        index = _telling_plane(labels, axis)
        sides = [spacing_zyx[a] for a in range(3) if a != axis]
        panels.append(_panel(hu.take(index, axis), labels.take(index, axis), sides, colours, upside_down=axis != 0))
    buffer = BytesIO()
    _framed(panels, label_map).save(buffer, format="PNG")
    write_whole(path, buffer.getvalue(), overwrite=overwrite)


def _telling_plane(labels: NDArray[np.uint8], axis: int) -> int:
    """The plane across `axis` that shows the most structures, then the most of them; the middle one if none."""
    present = np.unique(labels)[1:]
    others = tuple(a for a in range(3) if a != axis)
    areas = np.array([np.count_nonzero(labels == label, axis=others) for label in present]).reshape(len(present), -1)
    if not areas.size:
        return labels.shape[axis] // 2
    share = areas / areas.max(axis=1, keepdims=True)
    return int(np.argmax((share > 0).sum(axis=0) + share.mean(axis=0)))


def _panel(
    hu: NDArray[np.int16],
    labels: NDArray[np.uint8],
    sides: list[float],
    colours: NDArray[np.float32],
    *,
    upside_down: bool,
) -> Image:
    """One plane (rows, columns), `sides` mm a pixel -> RGB of PANEL_HEIGHT rows, square pixels, contours on it."""
    if upside_down:
        hu, labels = hu[::-1], labels[::-1]
    height, width = (count * side for count, side in zip(hu.shape, sides, strict=True))
    shape = (PANEL_HEIGHT, round(PANEL_HEIGHT * width / height))
    low, high = WINDOW
    grey = resample_linear(hu[None], (1, *shape))[0].clip(low, high)
    rows = (np.arange(shape[0]) * hu.shape[0] // shape[0])[:, None]
    drawn = labels[rows, np.arange(shape[1]) * hu.shape[1] // shape[1]]
    image = np.repeat(((grey - low) / (high - low) * 255)[..., None], 3, axis=-1)
    inside = drawn > 0
    image[inside] = (1 - TINT) * image[inside] + TINT * colours[drawn[inside]]
    border = np.zeros_like(inside)
    border[:-1] |= drawn[:-1] != drawn[1:]
    border[:, :-1] |= drawn[:, :-1] != drawn[:, 1:]
    line = np.maximum(drawn, np.maximum(np.roll(drawn, -1, 0), np.roll(drawn, -1, 1)))
    image[border] = colours[line[border]]
    return image.astype(np.uint8)


def _framed(panels: list[Image], label_map: LabelMap):  # type: ignore[no-untyped-def]  # a PIL image; PIL is lazy
    """The panels side by side, and a legend of what was drawn."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    width = sum(panel.shape[1] + MARGIN for panel in panels) + LEGEND_WIDTH
    canvas = Pillow.new("RGB", (width, PANEL_HEIGHT + 2 * MARGIN), BACKGROUND)
    x = MARGIN
    for panel in panels:
        canvas.paste(Pillow.fromarray(panel), (x, MARGIN))
        x += panel.shape[1] + MARGIN
    draw = ImageDraw.Draw(canvas)
    present = set(np.unique(label_map.labels).tolist())
    for line, (label, structure) in enumerate(enumerate(label_map.structures, start=1)):
        y = MARGIN + line * LINE_HEIGHT
        if label in present:
            draw.rectangle((x, y + 3, x + 10, y + 13), fill=structure.colour)
        draw.text((x + 16, y + 2), structure.tg263_name + ("" if label in present else " (none)"), fill=TEXT)
    return canvas
