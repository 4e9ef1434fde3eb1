"""The region finder around `segment`: what it is shown, what box comes of its answer, and what a wrong answer costs.

The finders here are wrong or right on purpose, and the runtime draws by Hounsfield units, so that the truth is known;
the learned finder is tested in test_region_finder.py.
"""

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import ModelError, ServerError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.preprocess import BOX_STEP
from anatomynet.engine.region import (
    Box,
    RegionConfig,
    box_from_coarse,
    coarse_factors,
    coarse_from_hu,
    grown_box,
    region_config_from_json,
    touched_faces,
)
from anatomynet.engine.segment import segment
from anatomynet.engine.volume import CTVolume, HounsfieldArray, LabelArray
from tests.test_segment import BRIGHT, MODEL, ORIENTATIONS, TISSUE, Thresholds, patient

STEM_ALONE = dataclasses.replace(MODEL, structures=("BrainStem",))
KNOWN = (*MODEL.structures, "Larynx", "Esophagus")
CONFIG = RegionConfig(KNOWN, (8.0, 8.0, 6.0), (-1000.0, 1000.0), threshold=0.0, margin=(0, 0, 0))
SPACING = (1.5, 1.5, 2.0)


@dataclass
class FixedFinder:
    """Answers with one box, in coarse voxels, whatever it is shown."""

    box: tuple[int, ...]
    config: RegionConfig = CONFIG
    shown: list[tuple[int, ...]] = field(default_factory=list)

    def find(self, coarse: HounsfieldArray) -> NDArray[np.int64]:
        self.shown.append(coarse.shape)
        return np.array(self.box, np.int64)


@dataclass
class BrightFinder:
    """Finds what is brighter than tissue, as the runtime draws it."""

    config: RegionConfig = CONFIG

    def find(self, coarse: HounsfieldArray) -> NDArray[np.int64]:
        places = np.argwhere(coarse > TISSUE)
        return np.concatenate((places.min(axis=0), places.max(axis=0) + 1))


class GoneFinder(FixedFinder):
    def find(self, coarse: HounsfieldArray) -> NDArray[np.int64]:
        raise ServerError("anatomynet_region did not answer")


@dataclass
class Painter:
    """Draws what is bright as the first structure, what is brighter as the second; remembers what it was shown."""

    region_finder: FixedFinder | BrightFinder | None
    model: ModelConfig = STEM_ALONE
    description: str = "a painter"
    shown: list[tuple[int, ...]] = field(default_factory=list)

    def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
        self.shown.append(hu.shape)
        labels = (hu > (TISSUE + BRIGHT) / 2).astype(np.uint8) + (hu > BRIGHT)
        present = [(labels == label).any() for label, _ in enumerate(self.model.structures, start=1)]
        return labels, np.array(present, np.float32)


def body_with(start: tuple[int, int, int], stop: tuple[int, int, int]) -> CTVolume:
    """96 x 144 x 192 voxels of tissue, with one bright block."""
    geometry = VolumeGeometry((96, 144, 192), SPACING)
    hu = np.full(geometry.shape, TISSUE, np.int16)
    hu[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = BRIGHT
    return CTVolume(hu, geometry)


FACTORS = coarse_factors(SPACING, CONFIG)  # 3, 5, 5
ORGAN = body_with((48, 60, 80), (60, 80, 110))
AROUND = (14, 10, 14, 22, 18, 24)  # of it, in coarse voxels


def same_labels(volume: CTVolume, painter: Painter) -> bool:
    drawn = segment(volume, painter)
    return np.array_equal(drawn.labels, segment(volume, painter, whole_volume=True).labels)


def test_a_found_box_is_all_that_is_computed() -> None:
    painter = Painter(FixedFinder(AROUND))
    drawn = segment(ORGAN, painter)
    assert painter.shown == [(32, 40, 56)]
    assert drawn.computed_share == pytest.approx(32 * 40 * 56 / ORGAN.hu.size)
    assert drawn.notes == ()
    assert np.array_equal(drawn.labels == 1, ORGAN.hu == BRIGHT)


def test_whole_volume_asks_no_finder() -> None:
    painter = Painter(FixedFinder(AROUND))
    drawn = segment(ORGAN, painter, whole_volume=True)
    assert painter.shown == [ORGAN.hu.shape]
    assert isinstance(painter.region_finder, FixedFinder)
    assert painter.region_finder.shown == []
    assert drawn.computed_share == 1


def test_a_finder_of_other_structures_is_not_asked() -> None:
    finder = FixedFinder(AROUND, dataclasses.replace(CONFIG, structures=("Parotid_L", "Parotid_R")))
    painter = Painter(finder)
    segment(ORGAN, painter)
    assert (painter.shown, finder.shown) == ([ORGAN.hu.shape], [])


@pytest.mark.parametrize(
    ("box", "face"),
    [
        ((18, 8, 10, 26, 18, 28), "lower"),
        ((8, 8, 10, 17, 18, 28), "upper"),
        ((10, 14, 10, 22, 24, 28), "front"),
        ((10, 5, 10, 22, 14, 28), "back"),
        ((10, 8, 19, 22, 18, 29), "right"),
        ((10, 8, 9, 22, 18, 19), "left"),
    ],
)
def test_a_cut_organ_makes_the_box_grow_there_once(box: tuple[int, ...], face: str) -> None:
    painter = Painter(FixedFinder(box))
    drawn = segment(ORGAN, painter)
    assert len(painter.shown) == 2
    assert sum(new > old for old, new in zip(*painter.shown, strict=True)) == 1
    assert f"the {face} face" in drawn.notes[0]
    assert len(drawn.notes) == 1
    assert np.array_equal(drawn.labels == 1, ORGAN.hu == BRIGHT)
    assert drawn.computed_share == pytest.approx(math.prod(painter.shown[1]) / ORGAN.hu.size)


def test_what_outgrows_the_grown_box_is_drawn_on_the_whole_body() -> None:
    """A bent organ: past the face that moved out, it leaves by another one."""
    volume = body_with((48, 60, 80), (60, 80, 110))
    volume.hu[58:90, 70:76, 100:106] = BRIGHT
    volume.hu[86:90, 70:140, 100:106] = BRIGHT
    painter = Painter(FixedFinder((10, 8, 10, 22, 18, 28)))
    drawn = segment(volume, painter)
    assert len(painter.shown) == 3
    assert painter.shown[2] == volume.hu.shape
    assert len(drawn.notes) == 1
    assert "drawn on the whole body" in drawn.notes[0]
    assert np.array_equal(drawn.labels == 1, volume.hu == BRIGHT)
    assert drawn.computed_share == 1


@pytest.mark.parametrize(
    ("name", "patients", "looked_for"),
    [("Larynx", (), True), ("Larynx", (9, 9), True), ("Larynx", (9, 0), False), ("Esophagus", (), False)],
)
@pytest.mark.parametrize("there", [True, False])
def test_what_the_box_does_not_show_is_looked_for_on_the_whole_body(
    name: str, patients: tuple[int, ...], looked_for: bool, there: bool
) -> None:
    """But for the oesophagus, above which many scans of head and neck end, and for what no patient taught."""
    volume = body_with((48, 60, 80), (60, 80, 110))
    if there:
        volume.hu[4:10, 100:110, 20:30] = BRIGHT + 1
    model = dataclasses.replace(STEM_ALONE, structures=("BrainStem", name), patients=patients)
    painter = Painter(FixedFinder(AROUND), model)
    drawn = segment(volume, painter)
    assert painter.shown == [(32, 40, 56), *[volume.hu.shape] * looked_for]
    assert (drawn.labels == 2).sum() == 600 * (there and looked_for)
    assert (drawn.labels == 1).sum() == 12 * 20 * 30
    assert len(drawn.notes) == looked_for
    if looked_for:
        assert drawn.notes[0] == "Larynx not found in the head-and-neck box: drawn again on the whole body"


def test_what_the_whole_body_does_not_show_is_not_looked_for_again() -> None:
    whole = (0, 0, 0, *(side // factor for side, factor in zip(ORGAN.hu.shape, FACTORS, strict=True)))
    painter = Painter(FixedFinder(whole), dataclasses.replace(STEM_ALONE, structures=("BrainStem", "Larynx")))
    drawn = segment(ORGAN, painter)
    assert painter.shown == [ORGAN.hu.shape]
    assert drawn.notes == ()


def test_a_stray_at_a_face_makes_nothing_grow() -> None:
    volume = body_with((48, 60, 80), (60, 80, 110))
    inner = segment(volume, painter := Painter(FixedFinder(AROUND)))
    assert inner.notes == ()
    start = (38, 50, 66)  # of the box that AROUND becomes
    volume.hu[start[0] : start[0] + 2, start[1] : start[1] + 2, start[2] : start[2] + 2] = BRIGHT
    painter.shown.clear()
    drawn = segment(volume, painter)
    assert len(painter.shown) == 1
    assert drawn.stray_ml is not None
    assert np.array_equal(drawn.labels, inner.labels)


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 0, 0, 0, 0),
        (10, 10, 10, 10, 20, 20),
        (10, 10, 10, 12, 12, 12),
        (20, 10, 10, 10, 20, 20),
        (-1, 0, 0, 20, 20, 20),
        (0, 0, 0, 20, 20, 200),
        (0, 0, 0, 20, 20),
    ],
)
def test_an_implausible_box_is_the_whole_body(box: tuple[int, ...]) -> None:
    painter = Painter(FixedFinder(box))
    drawn = segment(ORGAN, painter)
    assert painter.shown == [ORGAN.hu.shape]
    assert drawn.notes == ("head and neck were not found: drawn on the whole body",)


def test_a_server_without_an_answer_costs_time_and_no_study() -> None:
    painter = Painter(GoneFinder(AROUND))
    drawn = segment(ORGAN, painter)
    assert painter.shown == [ORGAN.hu.shape]
    assert drawn.notes == ("anatomynet_region did not answer; drawn on the whole body",)
    assert np.array_equal(drawn.labels == 1, ORGAN.hu == BRIGHT)


@pytest.mark.parametrize("shape", [(8, 8, 8), (8, 120, 160), (9, 15, 11), (33, 64, 200)])
def test_edge_sizes(shape: tuple[int, int, int]) -> None:
    """As few slices as the network takes; fewer voxels than a whole number of coarse ones."""
    hu = np.full(shape, TISSUE, np.int16)
    hu[2:6, 3:7, 3:7] = BRIGHT
    assert same_labels(CTVolume(hu, VolumeGeometry(shape, SPACING)), Painter(BrightFinder()))


def test_voxels_larger_than_coarse_ones() -> None:
    assert coarse_factors((9.0, 30.0, 12.0), CONFIG) == (1, 1, 1)


@pytest.mark.parametrize("direction", ORIENTATIONS)
def test_every_orientation(direction: NDArray[np.float64]) -> None:
    """The finder sees canonical axes, and what is drawn in its box comes back where it belongs."""
    volume, truth = patient(direction, (1.5, 1.5, 2.0) if direction[2, 2] else (2.0, 2.0, 2.0), 90.0)
    drawn = segment(volume, FindingThresholds())
    assert np.array_equal(drawn.labels, truth)
    assert drawn.computed_share is not None
    assert drawn.computed_share < 0.9


@pytest.mark.parametrize("spacing", [(0.75, 0.75, 1.25), (2.6, 2.6, 2.6), (1.0, 1.0, 5.0)])
def test_a_resampled_study(spacing: tuple[float, float, float]) -> None:
    volume, _ = patient(ORIENTATIONS[0], spacing, 90.0)
    with_box, whole = segment(volume, FindingThresholds()), segment(volume, FindingThresholds(), whole_volume=True)
    assert np.array_equal(with_box.labels, whole.labels)
    assert with_box.notes == whole.notes
    assert with_box.computed_share is not None
    assert whole.computed_share is not None
    assert with_box.computed_share < whole.computed_share


@dataclass
class FindingThresholds(Thresholds):
    """Thresholds whose halves do not move with the box, and a finder that is right."""

    region_finder: BrightFinder = field(default_factory=BrightFinder)


def test_coarse_voxels_are_means() -> None:
    hu = np.random.default_rng(0).integers(-1024, 3072, (13, 26, 35), dtype=np.int16)
    coarse = coarse_from_hu(hu, (3, 8, 8))
    assert coarse.shape == (4, 3, 4)
    assert coarse.dtype == np.int16
    for z, y, x in np.ndindex(coarse.shape):
        block = hu[3 * z : 3 * z + 3, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        assert coarse[z, y, x] == math.floor(block.mean())


def test_coarse_voxels_of_metal_do_not_overflow() -> None:
    assert (coarse_from_hu(np.full((16, 16, 16), 32767, np.int16), (16, 16, 16)) == 32767).all()


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 1.0), (0.9375, 0.9375, 2.0), (1.2238, 1.2238, 3.0), (1.0, 1.0, 1.5)])
def test_coarse_voxels_come_near_the_trained_spacing(spacing: tuple[float, float, float]) -> None:
    coarse = np.multiply(coarse_factors(spacing, CONFIG)[::-1], spacing)
    assert (np.abs(coarse / CONFIG.coarse_spacing - 1) <= 0.15).all()


sides = st.integers(8, 300)


@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(sides, sides, sides),
    factors=st.tuples(*[st.integers(1, 9)] * 3),
    ends=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=3),
    stride=st.sampled_from([1, 2, 4]),
)
def test_a_box_is_rounded_outwards_onto_the_pooling_grid(
    shape: tuple[int, int, int], factors: tuple[int, int, int], ends: list[tuple[float, float]], stride: int
) -> None:
    coarse = np.maximum(1, np.floor_divide(shape, factors))
    low = np.array([min(round(min(e) * c), c - 1) for e, c in zip(ends, coarse, strict=True)])
    high = np.array([max(round(max(e) * c), a + 1) for e, c, a in zip(ends, coarse, low, strict=True)])
    box = box_from_coarse(np.concatenate((low, high)), factors, shape, in_plane_stride=stride)
    for axis, scale in enumerate((1, stride, stride)):
        start, stop, size = box.start[axis], box.stop[axis], shape[axis]
        assert 0 <= start <= low[axis] * factors[axis]
        assert min(size, high[axis] * factors[axis]) <= stop <= size
        assert start % (2 * scale) == 0
        assert (stop - start) % (BOX_STEP[axis] * scale) == 0 or stop == size
        if high[axis] == coarse[axis]:
            assert stop == size


def test_faces() -> None:
    labels = np.zeros((8, 16, 16), np.uint8)
    labels[3, 15, 4] = 2
    inside = Box((4, 8, 0), (12, 24, 16))
    assert touched_faces(labels, inside, (40, 40, 40), in_plane_stride=1) == ("back",)
    assert touched_faces(labels, inside, (40, 24, 40), in_plane_stride=1) == ()
    labels[0, 3, 3] = 1
    assert touched_faces(labels, inside, (40, 40, 40), in_plane_stride=4) == ("lower", "front", "back")
    assert grown_box(inside, ("lower", "back"), (40, 40, 40)) == Box((0, 8, 0), (12, 40, 16))


def test_the_configuration_travels() -> None:
    assert region_config_from_json(CONFIG.to_json()) == CONFIG


@pytest.mark.parametrize(
    "change",
    [
        {"structures": ("Liver",)},
        {"coarse_spacing": (0.0, 8.0, 8.0)},
        {"hu_window": (1.0, -1.0)},
        {"margin": (0, -1, 0)},
    ],
)
def test_a_configuration_out_of_range_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="expected"):
        dataclasses.replace(CONFIG, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"structures": []}'])
def test_what_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(ModelError):
        region_config_from_json(text)
