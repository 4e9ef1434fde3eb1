"""The phantom is a human being in size, place and tissue, differs from seed to seed, and is the same on every grid."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from anatomynet.engine.errors import GeometryError, ModelError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.phantom import make_phantom, planning_geometry
from anatomynet.engine.structures import STRUCTURES
from anatomynet.engine.volume import CTVolume, LabelMap

# Three who differ most: the chin raised and lowered, the head small and large and turned either way, and filling, sinus
# and larger glands on either side.
SEEDS = (0, 4, 5)
FINE, COARSE = (1.953125, 1.953125, 2.0), (3.90625, 3.90625, 2.0)  # 256 and 128 voxels over the field of view

# ml, smallest and largest of adults' contours. Of the seven organs annotated in OpenKBP (Babier et al. 2021) the 5th
# and 95th percentile of its clinical contours, a fifth wider; a scan to the carina holds all of the neck's oesophagus
# and cord. Of the others from their anatomy: a nerve of 35 to 55 mm by 4 to 6 mm with its sheath, a chiasm of
# 12 to 18 mm by 8 by 4, a submandibular gland of 4 to 14 ml.
VOLUME_ML = {
    "BrainStem": (19.0, 41.0),
    "Chiasm": (0.4, 1.5),
    "Esophagus": (6.0, 21.0),
    "Larynx": (13.0, 45.0),
    "Mandible": (32.0, 94.0),
    "OpticNerve_L": (0.4, 1.5),
    "OpticNerve_R": (0.4, 1.5),
    "Parotid_L": (13.0, 47.0),
    "Parotid_R": (13.0, 47.0),
    "SpinalCord": (17.0, 50.0),
    "Submandibular_L": (4.0, 14.0),
    "Submandibular_R": (4.0, 14.0),
}
# Median HU; larynx and oesophagus hold air, the mandible's contour its marrow.
MEDIAN_HU = {
    "BrainStem": (25, 45),
    "Chiasm": (15, 45),
    "Esophagus": (15, 60),
    "Larynx": (-1000, 200),
    "Mandible": (400, 1300),
    "OpticNerve_L": (5, 50),
    "OpticNerve_R": (5, 50),
    "Parotid_L": (-50, 50),
    "Parotid_R": (-50, 50),
    "SpinalCord": (15, 50),
    "Submandibular_L": (20, 60),
    "Submandibular_R": (20, 60),
}
VOLUME_TOLERANCE = 0.08  # between voxels of 2 mm and of 4 mm, of which four span an oesophagus
SMALL_VOLUME_TOLERANCE = 0.25  # of organs about as thin as a voxel of the latter
SMALL_ML = 2.0
CENTROID_TOLERANCE_MM = 2.0  # half a voxel of the latter
LEAST_ASYMMETRY = 0.03  # of the paired glands' volumes
STEM_CONTRAST_HU = 10  # against what lies round it: fluid has 25 HU less than it, the brain 4 more, voxels hold both


@dataclass(frozen=True)
class Measured:
    """A phantom, and where its structures lie: each looked at in its own box, as a scan has a hundred times more."""

    volume: CTVolume
    truth: LabelMap

    @cached_property
    def boxes(self) -> dict[str, tuple[slice, slice, slice]]:
        """(z, y, x)."""
        found = ndimage.find_objects(self.truth.labels)
        return {s.name: box for s, box in zip(self.truth.structures, found, strict=True)}

    @cached_property
    def masks(self) -> dict[str, NDArray[np.bool_]]:
        """In their boxes."""
        return {s.name: self.truth.labels[self.boxes[s.name]] == i + 1 for i, s in enumerate(self.truth.structures)}

    @cached_property
    def volumes_ml(self) -> dict[str, float]:
        voxel = float(np.prod(self.truth.geometry.spacing)) / 1000
        return {name: float(mask.sum()) * voxel for name, mask in self.masks.items()}

    @cached_property
    def centroids(self) -> dict[str, NDArray[np.float64]]:
        """LPS (x, y, z) mm."""
        first = {name: np.array([side.start for side in box]) for name, box in self.boxes.items()}
        return {
            name: self.truth.geometry.points_from_indices((np.argwhere(mask).mean(axis=0) + first[name])[::-1])
            for name, mask in self.masks.items()
        }


@pytest.fixture(scope="module", params=SEEDS)
def phantom(request: pytest.FixtureRequest) -> Measured:
    return Measured(*make_phantom(planning_geometry().resampled(FINE), seed=request.param))


def masks(truth: LabelMap) -> dict[str, NDArray[np.bool_]]:
    return {s.name: truth.labels == i + 1 for i, s in enumerate(truth.structures)}


def test_default_is_the_planning_grid_with_every_structure() -> None:
    volume, truth = make_phantom(planning_geometry().resampled((8.0, 8.0, 8.0)))
    assert planning_geometry().shape == (178, 512, 512)
    assert tuple(s.name for s in truth.structures) == tuple(STRUCTURES)
    assert volume.geometry == truth.geometry


def test_volumes_are_human(phantom: Measured) -> None:
    wrong = {n: v for n, v in phantom.volumes_ml.items() if not VOLUME_ML[n][0] <= v <= VOLUME_ML[n][1]}
    assert not wrong


def test_tissues_have_their_density(phantom: Measured) -> None:
    hu = phantom.volume.hu
    medians = {name: float(np.median(hu[phantom.boxes[name]][mask])) for name, mask in phantom.masks.items()}
    wrong = {n: m for n, m in medians.items() if not MEDIAN_HU[n][0] <= m <= MEDIAN_HU[n][1]}
    assert not wrong


def test_every_structure_is_one_piece(phantom: Measured) -> None:
    pieces = {n: ndimage.label(mask, structure=np.ones((3, 3, 3)))[1] for n, mask in phantom.masks.items()}
    assert pieces == dict.fromkeys(STRUCTURES, 1)


def test_left_lies_left(phantom: Measured) -> None:
    centre = phantom.centroids
    for organ in ("Parotid", "Submandibular", "OpticNerve"):
        assert centre[f"{organ}_L"][0] > centre["SpinalCord"][0] > centre[f"{organ}_R"][0]


def test_organs_follow_one_another_from_head_to_chest(phantom: Measured) -> None:
    z = {name: point[2] for name, point in phantom.centroids.items()}
    downwards = ["Chiasm", "BrainStem", "Parotid_L", "Submandibular_L", "Larynx", "Esophagus"]
    assert sorted(downwards, key=lambda name: -z[name]) == downwards
    assert z["Parotid_L"] > z["Mandible"] > z["Larynx"]


def test_organs_follow_one_another_from_front_to_back(phantom: Measured) -> None:
    y = {name: point[1] for name, point in phantom.centroids.items()}
    for front, back in (
        ("Mandible", "Submandibular_R"),
        ("Submandibular_R", "Parotid_R"),
        ("OpticNerve_R", "Chiasm"),
        ("Chiasm", "BrainStem"),
        ("Larynx", "Esophagus"),
        ("Esophagus", "SpinalCord"),
    ):
        assert y[front] < y[back], (front, back)


def test_cord_goes_on_where_the_brain_stem_ends(phantom: Measured) -> None:
    stem, cord = (phantom.boxes[n][0] for n in ("BrainStem", "SpinalCord"))
    assert abs(stem.start - cord.stop) <= 2
    assert cord.start == 0, "a scan to the carina ends within the cord"


@pytest.mark.parametrize("side", ["before", "behind", "left", "right"])
def test_fluid_shows_the_brain_stem_from_medulla_to_midbrain(phantom: Measured, side: str) -> None:
    around = tuple(slice(side.start - 1, side.stop + 1) for side in phantom.boxes["BrainStem"])
    hu, stem = phantom.volume.hu[around], np.pad(phantom.masks["BrainStem"], 1)
    axis, step = {"before": (1, -1), "behind": (1, 1), "left": (2, 1), "right": (2, -1)}[side]
    rim = np.roll(stem, step, axis) & ~stem
    slices = np.flatnonzero(stem.any(axis=(1, 2)))
    for part in np.array_split(slices[2:-2], 4):  # its ends are rounded off by the head's flexion
        inside = hu[part][stem[part]].mean()
        assert inside - hu[part][rim[part]].mean() > STEM_CONTRAST_HU, f"slices {part[0]} to {part[-1]}"


def test_head_is_whole_and_lies_on_the_couch(phantom: Measured) -> None:
    volume = phantom.volume
    body = volume.hu > -200
    assert not body[-1].any(), "air over the vertex"
    assert not body[:, 0].any(), "air before the chest"
    behind = np.flatnonzero(body[5].any(axis=1))[-1] + 1
    assert (volume.hu[5, behind:] > -600).any(), "the couch lies behind the back"


def test_no_flip_goes_unseen(phantom: Measured) -> None:
    ml = phantom.volumes_ml
    for organ in ("Parotid", "Submandibular"):
        left, right = ml[f"{organ}_L"], ml[f"{organ}_R"]
        assert abs(left - right) / (left + right) * 2 > LEAST_ASYMMETRY
    # The metal filling lies on one side of the jaw.
    teeth = np.argwhere(phantom.volume.hu > 2500)
    middle = phantom.truth.geometry.indices_from_points(phantom.centroids["Mandible"])[0]
    assert len(teeth)
    assert (teeth[:, 2] > middle).all() or (teeth[:, 2] < middle).all()


def test_anatomy_does_not_depend_on_the_grid(phantom: Measured, request: pytest.FixtureRequest) -> None:
    seed = request.node.callspec.params["phantom"]
    coarse = Measured(*make_phantom(planning_geometry().resampled(COARSE), seed=seed))
    for name, volume in phantom.volumes_ml.items():
        tolerance = SMALL_VOLUME_TOLERANCE if volume < SMALL_ML else VOLUME_TOLERANCE
        assert coarse.volumes_ml[name] == pytest.approx(volume, rel=tolerance), name
    for name, point in phantom.centroids.items():
        assert np.abs(coarse.centroids[name] - point).max() < CENTROID_TOLERANCE_MM, name


def test_patient_lies_in_the_middle_wherever_the_origin_is() -> None:
    grid = planning_geometry().resampled((8.0, 8.0, 8.0))
    here, there = make_phantom(grid), make_phantom(replace(grid, origin=(100.0, -900.0, 37.0)))
    assert np.array_equal(here[0].hu, there[0].hu)
    assert np.array_equal(here[1].labels, there[1].labels)


def test_a_seed_is_a_person() -> None:
    grid = planning_geometry().resampled((5.0, 5.0, 5.0))
    first, again, other = (make_phantom(grid, seed=seed) for seed in (3, 3, 4))
    assert first[0].hu.tobytes() == again[0].hu.tobytes()
    assert first[1].labels.tobytes() == again[1].labels.tobytes()
    assert (first[1].labels != other[1].labels).mean() > 0.001


def test_slabs_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = planning_geometry().resampled((8.0, 8.0, 8.0))
    whole = make_phantom(grid, seed=1)
    monkeypatch.setattr("anatomynet.engine.phantom.SLAB_VOXELS", 1)
    sliced = make_phantom(grid, seed=1)
    assert np.array_equal(whole[1].labels, sliced[1].labels)
    assert np.abs(whole[0].hu.astype(int) - sliced[0].hu).max() <= 1, "but for the rounding of a half"


def test_labels_are_those_asked_for() -> None:
    grid = planning_geometry().resampled((5.0, 5.0, 5.0))
    every = masks(make_phantom(grid)[1])
    names = ("SpinalCord", "Mandible")
    chosen = make_phantom(grid, structures=names)[1]
    assert tuple(s.name for s in chosen.structures) == names
    assert set(np.unique(chosen.labels)) == {0, 1, 2}
    for name, mask in masks(chosen).items():
        assert np.array_equal(mask, every[name])


def test_unknown_structure_is_refused() -> None:
    with pytest.raises(ModelError, match="Pancreas"):
        make_phantom(structures=("Pancreas",))


@pytest.mark.parametrize(
    "direction",
    [
        ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1.0)),
        ((0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)),
        ((1.0, 0.0, 0.0), (0.0, 0.995, -0.0998), (0.0, 0.0998, 0.995)),
    ],
    ids=["prone axes", "transposed", "tilted"],
)
def test_turned_grid_is_refused(direction: tuple[tuple[float, float, float], ...]) -> None:
    grid = VolumeGeometry((8, 8, 8), (4.0, 4.0, 4.0), direction=(direction[0], direction[1], direction[2]))
    with pytest.raises(GeometryError, match="canonical"):
        make_phantom(grid)
