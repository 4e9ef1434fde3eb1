"""Findings: silent on a sound patient, one finding for each fault, in whatever orientation the array lies."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from anatomynet.engine.errors import GeometryError
from anatomynet.engine.findings import METAL_HU, Finding, find_contradictions, find_warnings, metal_near, usual_ranges
from anatomynet.engine.geometry import Index, VolumeGeometry
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.preprocess import array_from_canonical
from anatomynet.engine.structure_region import StructureRegion, regions_from_label_map
from anatomynet.engine.structures import STRUCTURES, structures_by_name
from anatomynet.engine.volume import CTVolume, LabelMap
from tests.openkbp import OPENKBP, requires_openkbp

SHAPE = (60, 180, 270)
SPACING = (1.3, 1.3, 3.0)
NAMES = ("BrainStem", "SpinalCord", "Parotid_R", "Parotid_L", "Mandible")
# Centre and half sides in voxels (z, y, x): sizes in the middle of their ranges, the cord down to the first slice.
BOXES = {
    "BrainStem": ((45, 90, 100), (5, 8, 8)),
    "SpinalCord": ((19, 100, 100), (19, 4, 4)),
    "Parotid_R": ((40, 80, 60), (5, 9, 9)),
    "Parotid_L": ((40, 80, 140), (5, 9, 9)),
    "Mandible": ((30, 50, 100), (4, 6, 34)),
}
ORIENTATIONS = {
    "head first supine": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "feet first prone": ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0)),
    "sagittal slices": ((0.0, 0.0, -1.0), (1.0, 0.0, 0.0), (0.0, -1.0, 0.0)),
}
LARGEST_SHARE_OF_ALARMS = 0.1  # of physicians' own contours

Canonical = NDArray[np.generic]
Change = Callable[[NDArray[np.uint8]], None]


def patient(*, change: Change | None = None) -> LabelMap:
    labels = np.zeros(SHAPE, np.uint8)
    for label, name in enumerate(NAMES, start=1):
        labels[box_of(name)] = label
    if change:
        change(labels)
    return LabelMap(labels, VolumeGeometry(SHAPE, SPACING), structures_by_name(NAMES))


def box_of(name: str) -> tuple[slice, ...]:
    centre, half = BOXES[name]
    return tuple(slice(c - h, c + h + 1) for c, h in zip(centre, half, strict=True))


def warnings_of(label_map: LabelMap, hu: NDArray[np.int16] | None = None) -> tuple[Finding, ...]:
    given = water_and_air(label_map.geometry.shape) if hu is None else hu
    return find_warnings(CTVolume(given, label_map.geometry), regions_from_label_map(label_map))


def water_and_air(shape: Index) -> NDArray[np.int16]:
    """HU of water, and of air in front of it."""
    hu = np.zeros(shape, np.int16)
    hu[:, 0] = -1000
    return hu


def only(findings: tuple[Finding, ...]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_a_sound_patient_gives_none() -> None:
    assert warnings_of(patient()) == ()


def test_nothing_drawn_is_told_structure_by_structure() -> None:
    nothing = patient(change=lambda labels: labels.fill(0))
    assert {w.name for w in warnings_of(nothing)} == {STRUCTURES[name].tg263_name for name in NAMES}
    assert all(w.index is None for w in warnings_of(nothing))


def test_no_region_and_other_rois_give_none() -> None:
    label_map = patient()
    volume = CTVolume(water_and_air(SHAPE), label_map.geometry)
    target = StructureRegion("PTV 70", (255, 0, 0), (0, 0, 0), np.ones((1, 1, 1), np.bool_))
    assert find_warnings(volume, ()) == ()
    assert find_warnings(volume, (target,)) == ()


def remove_brainstem(labels: NDArray[np.uint8]) -> None:
    labels[labels == 1] = 0


def behead(labels: NDArray[np.uint8]) -> None:
    labels[48:] = 0


def exchange_sides(labels: NDArray[np.uint8]) -> None:
    labels[box_of("Parotid_R")], labels[box_of("Parotid_L")] = (
        NAMES.index("Parotid_L") + 1,
        NAMES.index("Parotid_R") + 1,
    )


def test_exchanged_sides() -> None:
    found = only(warnings_of(patient(change=exchange_sides)))
    assert (found.name, found.text) == (
        "Parotid_L",
        "lies to the patient's right of Parotid_R: left and right are exchanged",
    )
    assert found.index == BOXES["Parotid_R"][0]


def test_a_lone_organ_on_the_wrong_side() -> None:
    label_map = patient(change=exchange_sides)
    volume = CTVolume(water_and_air(SHAPE), label_map.geometry)
    lone = [region for region in regions_from_label_map(label_map) if region.name != "Parotid_R"]
    texts = [w.text for w in find_warnings(volume, lone)]
    assert "lies on the patient's right: the side is exchanged" in texts
    assert "not drawn, though Parotid_L is" in texts


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("name", ["Parotid_L", "Parotid_R"])
def test_an_organ_on_the_wrong_side_of_which_nothing_else_tells(name: str, orientation: str) -> None:
    """The patient tells it, who need not lie in the middle of the scan."""
    for change, sides in ((None, 0), (exchange_sides, 1)):
        label_map = turned(patient(change=change), orientation)
        hu = np.full(SHAPE, -1000, np.int16)
        hu[:, 30:150, 20:181] = 40
        turned_hu = np.ascontiguousarray(array_from_canonical(hu, label_map.geometry))
        alone = [region for region in regions_from_label_map(label_map) if region.name == name]
        findings = find_contradictions(CTVolume(turned_hu, label_map.geometry), alone)
        assert [f.text.partition(":")[2] for f in findings] == [" the side is exchanged"] * sides


def test_an_organ_in_slices_without_a_patient_has_no_side() -> None:
    alone = [region for region in regions_from_label_map(patient(change=exchange_sides)) if region.name == "Parotid_L"]
    volume = CTVolume(np.full(SHAPE, -1000, np.int16), patient().geometry)
    assert "side" not in only(find_contradictions(volume, alone)).text


def test_missing_structure_and_expected_structure() -> None:
    label_map = patient(change=remove_brainstem)
    volume = CTVolume(water_and_air(SHAPE), label_map.geometry)
    assert only(warnings_of(label_map)) == Finding("Brainstem", "not found on this CT", None)
    found = find_warnings(
        volume, regions_from_label_map(patient()), expected=structures_by_name(("BrainStem", "Larynx"))
    )
    assert only(found) == Finding("Larynx", "not found on this CT", None)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_structure_cut_off_by_the_scan(orientation: str) -> None:
    cut = patient(change=behead)
    kept = replace(cut.geometry, shape=(48, *SHAPE[1:]))
    found = only(
        warnings_of(turned(LabelMap(np.ascontiguousarray(cut.labels[:48]), kept, cut.structures), orientation))
    )
    assert (found.name, found.text.split(":")[0]) == ("Brainstem", "reaches the end of the scan towards the head")


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_gives_the_same(orientation: str) -> None:
    exchanged = patient(change=exchange_sides)
    assert warnings_of(turned(patient(), orientation)) == ()
    found = only(warnings_of(turned(exchanged, orientation)))
    assert found.text == only(warnings_of(exchanged)).text
    assert found.index is not None
    assert turned(exchanged, orientation).labels[found.index] == NAMES.index("Parotid_L") + 1


def turned(label_map: LabelMap, orientation: str) -> LabelMap:
    """The same patient in an array of other axes."""
    direction = ORIENTATIONS[orientation]
    axes = [int(np.argmax(np.abs(column))) for column in np.array(direction).T]  # patient axis of x, y, z
    shape = tuple(label_map.geometry.shape[2 - axis] for axis in axes)[::-1]
    spacing = [label_map.geometry.spacing[axis] for axis in axes]
    geometry = VolumeGeometry((shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2]), direction=direction)
    labels = np.ascontiguousarray(array_from_canonical(label_map.labels, geometry))
    return LabelMap(labels, geometry, label_map.structures)


def test_several_pieces_but_no_crumbs() -> None:
    def split(labels: NDArray[np.uint8]) -> None:
        labels[18:21] = np.where(labels[18:21] == 2, 0, labels[18:21])

    def crumb(labels: NDArray[np.uint8]) -> None:
        labels[50, 40, 40] = 3

    found = only(warnings_of(patient(change=split)))
    assert (found.name, found.text.split(",")[0]) == ("SpinalCord", "in 2 pieces")
    assert found.index is not None
    assert found.index[0] in (0, 21)
    assert warnings_of(patient(change=crumb)) == ()


def test_unusual_sizes() -> None:
    def shrink(labels: NDArray[np.uint8]) -> None:
        labels[41:][labels[41:] == 1] = 0  # one slice of the brainstem is left

    def widen(labels: NDArray[np.uint8]) -> None:
        labels[0:39, 80:122, 90:112] = 2

    small, large = only(warnings_of(patient(change=shrink))), only(warnings_of(patient(change=widen)))
    assert small.text.startswith("unusually small: 1.47 ml, expected")  # 289 voxels of 5.07 mm3
    assert large.text.startswith("unusually large: 1560 mm² in cross-section, expected")  # 924 pixels of 1.69 mm2


def test_asymmetry() -> None:
    def shrink(labels: NDArray[np.uint8]) -> None:
        labels[40:][labels[40:] == 4] = 0

    found = only(warnings_of(patient(change=shrink)))
    assert found.name == "Parotid_R"
    assert found.text.startswith("2.2 times as large as Parotid_L")  # 11 slices and 5


def test_low_confidence() -> None:
    sure = replace(patient(), confidence=(0.9, 0.9, 0.9, 0.9, 0.9))
    doubtful = replace(patient(), confidence=(0.9, 0.9, 0.9, 0.9, 0.4))
    assert warnings_of(sure) == ()
    assert only(warnings_of(doubtful)).name == "Bone_Mandible"


def test_metal_near_the_structures_only() -> None:
    near, far = (water_and_air(SHAPE) for _ in range(2))
    near[30:34, 50:60, 90:110] = 3071  # 800 voxels, 4.1 ml
    far[:4, :10, :10] = 3071
    found = only(warnings_of(patient(), near))
    assert found.name is None
    assert found.text == "metal, 4.1 ml in 4 slices: streaks may hide the borders of SpinalCord, Bone_Mandible"
    assert found.index is not None
    assert near[found.index] == 3071
    assert warnings_of(patient(), far) == ()


def test_every_voxel_of_metal_is_found_in_order() -> None:
    rng = np.random.default_rng(4)
    hu = np.where(rng.random(SHAPE) < 1e-3, METAL_HU, 0).astype(np.int16)
    label_map = patient()
    everywhere = [StructureRegion("PTV 70", (255, 0, 0), (0, 0, 0), np.ones(SHAPE, np.bool_))]
    found = metal_near(CTVolume(hu, label_map.geometry), everywhere)
    np.testing.assert_array_equal(found, np.argwhere(hu >= METAL_HU))


def test_a_ct_without_air() -> None:
    """What its header calls Hounsfield units need not be."""
    found = only(warnings_of(patient(), np.zeros(SHAPE, np.int16)))
    assert found == Finding(None, "no air in the CT, its least value is 0: is it in Hounsfield units?", None)


def test_unusual_scan() -> None:
    label_map = patient()
    thick = replace(label_map.geometry, spacing=(0.9, 0.9, 7.5))
    volume = CTVolume(water_and_air(SHAPE), thick)
    texts = [w.text.split(" mm")[0] for w in find_warnings(volume, ())]
    assert texts == ["slice distance 7.5", "field of view 243", "length of the scan 450"]


def test_oblique_volume_is_refused() -> None:
    c, s = np.cos(0.2), np.sin(0.2)
    geometry = VolumeGeometry(SHAPE, SPACING, direction=((c, -s, 0.0), (s, c, 0.0), (0.0, 0.0, 1.0)))
    with pytest.raises(GeometryError, match="oblique"):
        find_warnings(CTVolume(np.zeros(SHAPE, np.int16), geometry), ())


def test_ranges_name_known_structures() -> None:
    ranges = usual_ranges()
    tables = ("volume_ml", "cross_section_mm2", "largest_ratio")
    assert set(ranges) == {"most_metal_ml", "scan_mm", *tables}
    assert all(name in STRUCTURES for table in tables for name in ranges[table])
    assert all(0 < low < high for table in ("scan_mm", *tables[:2]) for low, high in ranges[table].values())
    assert all(ratio > 1 and STRUCTURES[name].mirror for name, ratio in ranges["largest_ratio"].items())


def test_a_phantom_gives_none() -> None:
    volume, truth = make_phantom(VolumeGeometry((118, 128, 128), (3.9, 3.9, 3.0)), seed=2, structures=NAMES)
    assert [w for w in find_warnings(volume, regions_from_label_map(truth)) if "in plane" not in w.text] == []


@requires_openkbp
def test_physicians_contours_give_few() -> None:
    from anatomynet.engine.data import find_cases, read_case

    drawn = alarms = 0
    for folder in find_cases(OPENKBP / "validation")[::3]:
        case = read_case(folder, NAMES)
        label_map = LabelMap(case.labels, case.volume.geometry, structures_by_name(NAMES))
        regions = [r for r, known in zip(regions_from_label_map(label_map), case.annotated, strict=True) if known]
        drawn += len(regions)
        alarms += sum(w.text.startswith(("unusually", "in ", "lies")) for w in find_warnings(case.volume, regions))
    assert alarms <= LARGEST_SHARE_OF_ALARMS * drawn


def test_what_was_left_out_is_told() -> None:
    assert only(warnings_of(replace(patient(), stray_ml=(0.0, 0.0, 0.0, 3.2, 0.1)))) == Finding(
        "Parotid_L",
        "3.2 ml in small pieces apart from it were left out: the network was unsure here",
        BOXES["Parotid_L"][0],
    )
