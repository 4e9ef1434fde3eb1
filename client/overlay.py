"""A comparison as pictures: where both agree and where one alone drew, and both side by side through the slices.

The colours are those of Zhu et al., Figure 1: green the physician, red the network, yellow where they agree.
"""

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anatomynet.client.compare import Comparison
from anatomynet.client.picture import (
    BACKGROUND,
    LINE_HEIGHT,
    MARGIN,
    TEXT,
    TINT,
    Colour,
    Image,
    LegendLine,
    framed,
    scene_from_volume,
    telling_plane,
    write_png,
)
from anatomynet.engine.errors import OutputError
from anatomynet.engine.output import write_whole
from anatomynet.engine.preprocess import canonical_from_array
from anatomynet.engine.stops import temporary_folder
from anatomynet.engine.volume import CTVolume, LabelArray

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

AGREEMENT, REFERENCE, PREDICTION = 1, 2, 3  # labels of the overlay
OVERLAY_COLOURS: tuple[Colour, ...] = ((250, 220, 40), (40, 190, 70), (230, 50, 40))
OVERLAY_TINT = 0.5
ROWS = 2  # planes a direction; the second shows what the first does not
FRAMES_PER_SECOND = 12
GREYS = 144  # of a GIF's 256 colours
TINTED_GREYS = 112  # shared by the structures


def write_figure(path: Path, volume: CTVolume, comparison: Comparison, *, overwrite: bool = False) -> None:
    """Writes a PNG: the telling axial, coronal and sagittal planes, what both drew and what one alone drew.

    Raises:
        GeometryError: an oblique volume.
        OutputError: a file that exists, or cannot be written.
    """
    reference = canonical_from_array(label_map_of(comparison, "reference"), comparison.geometry)
    overlay = canonical_from_array(overlay_labels(comparison), comparison.geometry)
    scene = scene_from_volume(volume, overlay, OVERLAY_COLOURS, tint=OVERLAY_TINT)
    columns = [[scene.panel(overlay, axis, k) for k in _telling_planes(reference, axis)] for axis in range(3)]
    rows = [[column[row] for column in columns if row < len(column)] for row in range(ROWS)]
    legend: list[LegendLine] = [
        *zip(OVERLAY_COLOURS, ("agreement", "reference alone", "prediction alone"), strict=True),
        (None, ""),
        (None, "DSC"),
        *((None, f"{p.agreement.dice:.2f}  {p.structure.tg263_name}") for p in comparison.pairs),
    ]
    write_png(path, framed([row for row in rows if row], legend), overwrite=overwrite)


def check_animation(path: Path) -> None:
    """Asked before any work is done.

    Raises:
        OutputError: another ending than .gif and .mp4; no ffmpeg for the latter.
    """
    ending = path.suffix.lower()
    if ending not in (".gif", ".mp4"):
        raise OutputError(f"{path}: expected a name that ends in .gif or .mp4")
    if ending == ".mp4":
        _ffmpeg()


def write_animation(path: Path, volume: CTVolume, comparison: Comparison, *, overwrite: bool = False) -> None:
    """Writes a GIF, or an MP4 where ffmpeg is installed: reference left, prediction right, from the feet to the head.

    Raises:
        GeometryError: an oblique volume.
        OutputError: another ending, no ffmpeg, a file that exists, or cannot be written.
    """
    check_animation(path)
    frames = _frames(volume, comparison)
    if path.suffix.lower() == ".gif":
        data = _gif(frames, [pair.structure.colour for pair in comparison.pairs])
    else:
        data = _mp4(frames)
    write_whole(path, data, overwrite=overwrite)


def overlay_labels(comparison: Comparison) -> LabelArray:
    """uint8 (z, y, x) on the CT's grid: AGREEMENT, REFERENCE alone or PREDICTION alone, each structure with itself.

    Where structures overlap, a disagreement in one hides agreement in another.
    """
    labels = np.zeros(comparison.geometry.shape, np.uint8)
    for pair in comparison.pairs:
        drawn, truth = pair.prediction.mask(comparison.geometry), pair.reference.mask(comparison.geometry)
        labels[drawn & truth & (labels == 0)] = AGREEMENT
        labels[truth & ~drawn] = REFERENCE
        labels[drawn & ~truth] = PREDICTION
    return labels


def label_map_of(comparison: Comparison, side: str) -> LabelArray:
    """uint8 (z, y, x) on the CT's grid: i + 1 for pairs[i] as one side ("prediction" or "reference") drew it."""
    labels = np.zeros(comparison.geometry.shape, np.uint8)
    for label, pair in enumerate(comparison.pairs, start=1):
        labels[getattr(pair, side).mask(comparison.geometry)] = label
    return labels


def _telling_planes(labels: LabelArray, axis: int) -> list[int]:
    """The plane that shows most, then the one that shows most of the rest."""
    planes: list[int] = []
    while len(planes) < ROWS and (labels.any() or not planes):
        planes.append(telling_plane(labels, axis))
        shown = np.unique(labels.take(planes[-1], axis))
        labels = np.where(np.isin(labels, shown), np.uint8(0), labels)
    return planes


def _frames(volume: CTVolume, comparison: Comparison) -> Iterator[Image]:
    """RGB of each axial slice, even sides."""
    sides = [
        canonical_from_array(label_map_of(comparison, side), comparison.geometry)
        for side in ("reference", "prediction")
    ]
    scene = scene_from_volume(volume, sides[0] | sides[1], [pair.structure.colour for pair in comparison.pairs])
    for k in range(len(scene.hu)):
        panels = [scene.panel(labels, 0, k) for labels in sides]
        yield _captioned(panels, ("reference", "prediction"), f"slice {k + 1} of {len(scene.hu)}")


def _captioned(panels: Sequence[Image], captions: Sequence[str], where: str) -> Image:
    from PIL import Image as Pillow
    from PIL import ImageDraw

    height, width = panels[0].shape[0] + LINE_HEIGHT + MARGIN, 2 * panels[0].shape[1] + 3 * MARGIN
    canvas = Pillow.new("RGB", (width + width % 2, height + height % 2), BACKGROUND)  # video wants even sides
    draw = ImageDraw.Draw(canvas)
    for number, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        x = MARGIN + number * (panel.shape[1] + MARGIN)
        canvas.paste(Pillow.fromarray(panel), (x, LINE_HEIGHT))
        draw.text((x, 4), caption, fill=TEXT)
    draw.text((width - 110, 4), where, fill=TEXT)
    return np.asarray(canvas)


def _gif(frames: Iterator[Image], colours: Sequence[Colour]) -> bytes:
    from PIL import Image as Pillow

    palette = Pillow.new("P", (1, 1))
    palette.putpalette(_palette(colours).tobytes())
    images: list[PillowImage] = [
        Pillow.fromarray(frame).quantize(palette=palette, dither=Pillow.Dither.NONE) for frame in frames
    ]
    buffer = BytesIO()
    images[0].save(
        buffer, format="GIF", save_all=True, append_images=images[1:], duration=1000 // FRAMES_PER_SECOND, loop=0
    )
    return buffer.getvalue()


def _palette(colours: Sequence[Colour]) -> NDArray[np.uint8]:
    """Up to 256 colours for every frame: greys, each structure's colour, and greys tinted with it."""
    grey = np.repeat(np.linspace(0, 255, GREYS)[:, None], 3, axis=1)
    count = max(2, TINTED_GREYS // max(1, len(colours)))
    ramps = [
        np.vstack((colour, (1 - TINT) * np.linspace(0, 255, count - 1)[:, None] + TINT * np.array(colour)))
        for colour in colours
    ]
    return np.vstack((grey, *ramps))[:256].round().astype(np.uint8)


def _ffmpeg() -> str:
    program = shutil.which("ffmpeg")
    if program is None:
        raise OutputError("an MP4 needs ffmpeg, which is not installed here; install it, or write a .gif")
    return program


def _mp4(frames: Iterator[Image]) -> bytes:
    with temporary_folder() as folder:
        raw, film = Path(folder, "frames.rgb"), Path(folder, "film.mp4")
        with raw.open("wb") as file:
            for frame in frames:
                file.write(frame.tobytes())
                height, width, _ = frame.shape
        given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(FRAMES_PER_SECOND)]
        command = [_ffmpeg(), "-loglevel", "error", *given, "-i", str(raw), "-pix_fmt", "yuv420p", str(film)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OutputError(f"ffmpeg could not make the film: {done.stderr.strip()[-200:]}")
        return film.read_bytes()
