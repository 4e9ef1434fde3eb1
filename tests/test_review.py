"""The review page in a real browser: opens, scrolls, and every contour lies on its organ as the picture shows it."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from anatomynet.client.cli import main
from anatomynet.client.contours import trace_contours
from anatomynet.client.ct_writer import write_ct_series
from anatomynet.client.review import HU_RANGE, LARGEST_VOXEL_COUNT, reduce_ct, regions_from_structure_set, write_review
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.structure_set import Roi, StructureSet
from anatomynet.engine.errors import GeometryError, OutputError
from anatomynet.engine.findings import Finding
from anatomynet.engine.geometry import IDENTITY, Direction, VolumeGeometry
from anatomynet.engine.preprocess import array_from_canonical
from anatomynet.engine.structure_region import StructureRegion, regions_from_label_map
from anatomynet.engine.structures import STRUCTURES, structures_by_name
from anatomynet.engine.volume import CTVolume, LabelMap
from tests.browser import CHROMIUM, Page, chromium

requires_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no browser here: apt-get install chromium")

# A body without symmetry (z, y, x): tissue with a nose in front and a bump on its right, glands that are told by their
# HU, and a second one by its place.
SHAPE = (40, 90, 100)
SPACING = (1.5, 1.5, 3.0)
ORIGIN = (-70.0, -40.0, -500.0)
NAMES = ("Parotid_L", "Parotid_R", "Larynx")
ORGANS = {
    "Parotid_L": (slice(22, 31), slice(38, 52), slice(62, 76)),
    "Parotid_R": (slice(22, 31), slice(38, 52), slice(24, 38)),
}
BODY = (slice(4, 38), slice(15, 80), slice(15, 85))
NOSE = (slice(24, 28), slice(8, 15), slice(48, 53))
ORGAN_HU, TISSUE_HU, AIR_HU = 200, 0, -1000
DIRECTIONS: dict[str, Direction] = {
    "head first supine": IDENTITY,
    "feet first prone": ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0)),
    "sagittal slices": ((0.0, 0.0, -1.0), (1.0, 0.0, 0.0), (0.0, -1.0, 0.0)),
}
LARGEST_PAGE_MB = 25
COLOUR_TOLERANCE = 40  # of a line's middle, which blending softens
# The picture's organ ends where its smoothed edge is half as bright; half of the line lies outside it.
EDGE_TOLERANCE_PX = 2
LENGTH_TOLERANCE = 0.04
HALF_ORGAN_GREY = 166  # in the soft-tissue window tissue is 102, the organ 230
HALF_TISSUE_GREY = 51
GREY_TOLERANCE = 3  # between the colours of a pixel; every text is tinted
MINUS = "\N{MINUS SIGN}"

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def patient(direction: Direction = IDENTITY) -> tuple[CTVolume, LabelMap]:
    """The body, its array turned to `direction`, at the same place."""
    hu = np.full(SHAPE, AIR_HU, np.int16)
    hu[BODY] = hu[NOSE] = TISSUE_HU
    labels = np.zeros(SHAPE, np.uint8)
    for label, name in enumerate(NAMES[:2], start=1):
        hu[ORGANS[name]] = ORGAN_HU
        labels[ORGANS[name]] = label
    axes = [int(np.argmax(np.abs(column))) for column in np.array(direction).T]
    shape, spacing = [SHAPE[2 - axis] for axis in axes][::-1], [SPACING[axis] for axis in axes]
    geometry = VolumeGeometry((shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2]), ORIGIN, direction)
    own_hu = np.ascontiguousarray(array_from_canonical(hu, geometry))
    own_labels = np.ascontiguousarray(array_from_canonical(labels, geometry))
    return CTVolume(own_hu, geometry), LabelMap(own_labels, geometry, structures_by_name(NAMES))


def write_patient(path: Path, direction: Direction = IDENTITY, *, with_reference: bool = True) -> Path:
    volume, label_map = patient(direction)
    shifted = replace(label_map, labels=np.roll(label_map.labels, 4, axis=1))
    warnings = (Finding("Larynx", "not found on this CT", None), Finding("Parotid_R", "look <b>here</b>", (25, 45, 30)))
    write_review(
        path,
        volume,
        regions_from_label_map(label_map),
        reference=regions_from_label_map(shifted) if with_reference else (),
        warnings=warnings,
        notes=("resampled from 1 to 2 mm",),
    )
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def review(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patient(tmp_path_factory.mktemp("review") / "review.html")


def picture_of(page: Page) -> Image:
    """The large pane of a screenshot, without the strip at its right."""
    large = "document.querySelector('[data-place=large] canvas')"
    x, y, width, height = page.evaluate(f"(r => [r.x, r.y, r.width - 18, r.height])({large}.getBoundingClientRect())")
    return page.screenshot()[round(y) : round(y + height), round(x) : round(x + width)]


def near(picture: Image, colour: tuple[int, int, int]) -> Mask:
    """Pixels of nearly this colour."""
    found: Mask = np.abs(picture.astype(int) - colour).max(axis=-1) <= COLOUR_TOLERANCE
    return found


def brighter(picture: Image, grey: int) -> Mask:
    """Pixels of the CT above this grey."""
    found: Mask = (picture.min(axis=-1) > grey) & (np.ptp(picture, axis=-1) <= GREY_TOLERANCE)
    return found


def bounds(mask: Mask) -> NDArray[np.intp]:
    """First and last row, first and last column."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([rows[0], rows[-1], columns[0], columns[-1]])


@requires_chromium
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_contour_lies_on_the_organ(page: Page, tmp_path: Path, plane: str, direction: str) -> None:
    path = write_patient(tmp_path / "review.html", DIRECTIONS[direction], with_reference=False)
    page.open(path, f"structure=Parotid_L&main={plane}&layout=single&show=-crosshair&hide=Parotid_R")
    contour = bounds(near(picture_of(page), STRUCTURES["Parotid_L"].colour))
    page.press("v")
    bright = brighter(picture_of(page), HALF_ORGAN_GREY)
    width = bright.shape[1]
    if plane != "sagittal":  # the left gland is on the right of the picture, the right one on its left
        assert contour[2] > width / 2
        bright[:, : width // 2] = False
    np.testing.assert_allclose(contour, bounds(bright), atol=EDGE_TOLERANCE_PX)
    z, y, x = (part.stop - part.start for part in ORGANS["Parotid_L"])
    sides_mm = {
        "axial": (y * SPACING[1], x * SPACING[0]),
        "coronal": (z * SPACING[2], x * SPACING[0]),
        "sagittal": (z * SPACING[2], y * SPACING[1]),
    }
    scale = page.evaluate(
        "(s => s.querySelector('i').getBoundingClientRect().width / parseFloat(s.textContent))"
        "(document.querySelector('[data-place=large] .scale'))"
    )
    sides_px = (contour[1] - contour[0] - 1, contour[3] - contour[2] - 1)  # between the middles of the line
    np.testing.assert_allclose(np.divide(sides_px, scale), sides_mm[plane], rtol=LENGTH_TOLERANCE)
    assert page.complaints == []


@requires_chromium
def test_edges_say_where_the_nose_and_the_head_are(page: Page, review: Path) -> None:
    letters = {"axial": "RLAP", "coronal": "RLHF", "sagittal": "APHF"}
    page.open(review)
    for plane, expected in letters.items():
        shown = [page.text(f"[data-plane={plane}] .edge.{side}") for side in ("left", "right", "top", "bottom")]
        assert "".join(shown) == expected
    page.open(review, "place=5,30,-420&main=sagittal&layout=single&show=-crosshair,-contours")
    body = brighter(picture_of(page), HALF_TISSUE_GREY)
    nose = body[:, : bounds(body)[2] + 8]  # reaches furthest to the left, where the front is
    middle = bounds(nose)[:2].mean()
    assert middle < bounds(body)[:2].mean()  # in the upper half, as z 24 to 28 of 4 to 38 is


@requires_chromium
def test_wheel_and_keys_go_through_the_slices(page: Page, review: Path) -> None:
    page.open(review, "place=0,0,-440")
    place = "[data-plane={}] .place"
    assert page.text(place.format("axial")) == f"z {MINUS}440.0 mm   21 / 40"
    page.wheel(page.middle("[data-plane=axial]"), -120)
    assert page.text(place.format("axial")) == f"z {MINUS}437.0 mm   22 / 40"
    page.wheel(page.middle("[data-plane=coronal]"), 120)
    assert page.text(place.format("coronal")).endswith("29 / 90")
    page.press("PageUp")
    assert page.text(place.format("coronal")).endswith("19 / 90")
    for key, slice_number in (("Home", "1 / 90"), ("End", "90 / 90"), ("ArrowDown", "90 / 90")):
        page.press(key)
        assert page.text(place.format("coronal")).endswith(f"  {slice_number}")
    assert page.complaints == []


@requires_chromium
def test_windows_change_the_greys(page: Page, review: Path) -> None:
    page.open(review, "structure=Parotid_L&layout=single&show=-crosshair,-contours")
    greys = {}
    for key, name in (("1", "soft"), ("2", "bone"), ("3", "brain")):
        page.press(key)
        assert page.evaluate(f"document.querySelector('[data-window={name}]').ariaPressed") == "true"
        picture = picture_of(page)
        greys[name] = int(picture[picture.shape[0] // 2, picture.shape[1] // 2 - 20, 0])
    # Tissue of 0 HU: a share of 0.4 in 40 +- 200, 0.3 in 400 +- 1000, 0 in 40 +- 40.
    np.testing.assert_allclose([greys["soft"], greys["bone"], greys["brain"]], [102, 76, 0], atol=2)
    x, y = page.middle("[data-place=large]")
    page.drag((x, y), (x + 10, y - 10), button="right")
    assert page.text("#window") == "L 60  W 120"


@requires_chromium
def test_structures_switch_on_and_off(page: Page, review: Path) -> None:
    page.open(review, "structure=Parotid_L&layout=single&show=-crosshair,-reference")
    left, right = STRUCTURES["Parotid_L"].colour, STRUCTURES["Parotid_R"].colour
    assert near(picture_of(page), left).any()
    assert near(picture_of(page), right).any()
    page.click("#structures tr:nth-child(2) input")
    assert not near(picture_of(page), left).any()
    assert near(picture_of(page), right).any()
    page.click("#all")  # shows all again
    assert near(picture_of(page), left).any()
    page.click("#all")
    assert not near(picture_of(page), right).any()
    page.click("#all")
    page.press("v")
    assert not near(picture_of(page), left).any()


@requires_chromium
def test_panel_gives_volumes_and_leads_to_structures_and_warnings(page: Page, review: Path) -> None:
    page.open(review, "place=0,0,-500")
    cells = page.evaluate(
        "[...document.querySelectorAll('#structures tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    volume_ml = f"{9 * 14 * 14 * np.prod(SPACING) / 1000:.1f}"
    assert cells[1:] == [
        ["Parotid_L", volume_ml, volume_ml, "0.71"],  # 4 of 14 rows apart
        ["Parotid_R", volume_ml, volume_ml, "0.71"],
        ["Larynx", "none", "none", "\N{EN DASH}"],
    ]
    page.click("#structures tr:nth-child(2) button")
    assert page.text("[data-plane=axial] .place").endswith(" 27 / 40")  # the middle of 22 to 30, counted from 1
    page.click("#warnings li:nth-child(2) button")
    places = [page.text(f"[data-plane={plane}] .place") for plane in ("sagittal", "coronal", "axial")]
    assert [place.split()[-3] for place in places] == ["31", "46", "26"]
    assert "look <b>here</b>" in page.text("#warnings li:nth-child(2)")
    assert page.text("#notes") == "resampled from 1 to 2 mm"
    page.press("n")
    assert page.evaluate("document.querySelector('#warnings li.current strong').textContent") == "Larynx"


@requires_chromium
def test_reference_is_dashed_and_beside(page: Page, review: Path) -> None:
    page.open(review, "structure=Parotid_L&layout=single&show=-crosshair")
    both = near(picture_of(page), STRUCTURES["Parotid_L"].colour).sum()
    page.press("r")
    drawn = near(picture_of(page), STRUCTURES["Parotid_L"].colour).sum()
    assert 1.3 * drawn < both < 1.9 * drawn  # a dashed line more, and a few pixels where both run
    page.press("r")
    page.press("b")
    titles = page.evaluate("[...document.querySelectorAll('.pane:not([hidden]) .title')].map(t => t.textContent)")
    assert titles == ["Axial drawn", "Axial reference"]
    assert page.complaints == []


@requires_chromium
def test_pointer_reads_hounsfield_units_and_names(page: Page, review: Path) -> None:
    page.open(review, "structure=Parotid_L&layout=single")
    x, y = page.middle("[data-place=large] > canvas")
    picture = picture_of(page)
    rows_and_columns = bounds(near(picture, STRUCTURES["Parotid_L"].colour))
    left, top = page.evaluate("(r => [r.x, r.y])(document.querySelector('[data-place=large]').getBoundingClientRect())")
    inside = (left + rows_and_columns[2:].mean(), top + rows_and_columns[:2].mean())
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=inside[0], y=inside[1])
    assert page.text("[data-place=large] .probe") == f"Parotid_L   {ORGAN_HU} HU"
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + 3, y=y)
    assert page.text("[data-place=large] .probe") == f"{MINUS}{-AIR_HU} HU"
    assert x > left


@requires_chromium
def test_nothing_drawn_and_nothing_to_warn_of(page: Page, tmp_path: Path) -> None:
    volume, _ = patient()
    write_review(tmp_path / "empty.html", volume, ())
    page.open(tmp_path / "empty.html")
    assert page.evaluate("document.documentElement.dataset.state") == "ready"
    assert "no contours" in page.text(".panel section")
    assert "None" in page.text(".panel section:nth-child(2)")
    for key in "]nrbmfx0+":
        page.press(key)
    assert page.complaints == []


@requires_chromium
def test_hostile_names_stay_text(page: Page, tmp_path: Path) -> None:
    volume, _ = patient()
    name = "</script><script>alert(1)</script>{{style}}"
    region = StructureRegion(name, (255, 0, 0), (3, 3, 3), np.ones((2, 2, 2), np.bool_))
    write_review(tmp_path / "hostile.html", volume, (region,), header={"Patient": "<img src=x>"})
    page.open(tmp_path / "hostile.html")
    assert page.text("#structures .name button") == name
    assert page.text("#patient dd") == "<img src=x>"
    assert page.complaints == []


@requires_chromium
def test_page_asks_for_nothing_but_itself(page: Page, review: Path) -> None:
    page.open(review)
    assert page.requests == [review.resolve().as_uri()]
    assert "'sha256-" in page.evaluate("document.querySelector('meta[http-equiv]').content")


def without_a_block(page: str) -> str:
    return re.sub(r'<script type="application/octet-stream" class="ct">[^<]+</script>', "", page, count=1)


def with_a_damaged_block(page: str) -> str:
    return page.replace('class="ct">', 'class="ct">AAAA', 1)


@requires_chromium
@pytest.mark.parametrize("damage", [without_a_block, with_a_damaged_block])
def test_damaged_page_says_so(page: Page, review: Path, tmp_path: Path, damage: Callable[[str], str]) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(damage(review.read_text()))
    page.open(broken)
    assert page.evaluate("document.documentElement.dataset.state") == "failed"
    assert "could not be opened" in page.text("#status h2")
    assert "copy the file again" in page.text("#status-text")


@requires_chromium
def test_help_opens_and_closes(page: Page, review: Path) -> None:
    page.open(review)
    page.press("h")
    assert page.evaluate("document.getElementById('help').open")
    page.click("#help button")
    assert not page.evaluate("document.getElementById('help').open")


def test_reduced_ct_keeps_means_place_and_slices() -> None:
    shape = (3, 512, 400)
    hu = np.random.default_rng(7).integers(-1000, 3000, shape).astype(np.int16)
    geometry = VolumeGeometry(shape, (0.9, 0.9, 2.5), (-200.0, -230.0, 10.0))
    reduced, grid = reduce_ct(CTVolume(hu, geometry))
    means = hu.reshape(3, 256, 2, 200, 2).mean(axis=(2, 4))
    assert np.abs(reduced - means).max() <= 0.5 + 1e-3
    assert grid.shape == (3, 256, 200)
    np.testing.assert_allclose(grid.spacing, (1.8, 1.8, 2.5))
    np.testing.assert_allclose(grid.origin, (-200 + 0.45, -230 + 0.45, 10))


@pytest.mark.parametrize("shape", [(2, 300, 270), (5, 40, 64), (700, 130, 150)])
def test_reduced_ct_fits_its_budget(shape: tuple[int, int, int]) -> None:
    volume = CTVolume(np.full(shape, 3071, np.int16), VolumeGeometry(shape, (1.0, 1.0, 1.0)))
    reduced, grid = reduce_ct(volume)
    assert reduced.shape[0] == shape[0]
    assert reduced.size <= LARGEST_VOXEL_COUNT
    assert max(reduced.shape[1:]) <= 256
    assert reduced.min() == reduced.max() == HU_RANGE[1]
    np.testing.assert_allclose(np.multiply(grid.shape[::-1], grid.spacing), shape[::-1])


def test_full_size_page_stays_small(tmp_path: Path) -> None:
    """The worst case: a sharp kernel's noise in every voxel, air and all."""
    shape = (178, 512, 512)
    hu = np.random.default_rng(11).normal(0, 60, shape).astype(np.int16)
    write_review(tmp_path / "full.html", CTVolume(hu, VolumeGeometry(shape, (0.98, 0.98, 2.0))), ())
    assert (tmp_path / "full.html").stat().st_size < LARGEST_PAGE_MB * 1e6


def test_existing_page_is_kept(tmp_path: Path) -> None:
    path = write_patient(tmp_path / "review.html")
    with pytest.raises(OutputError, match="exists"):
        write_patient(path)


def test_oblique_volume_is_refused(tmp_path: Path) -> None:
    c, s = np.cos(0.1), np.sin(0.1)
    geometry = VolumeGeometry((8, 8, 8), (1.0, 1.0, 1.0), direction=((c, -s, 0.0), (s, c, 0.0), (0.0, 0.0, 1.0)))
    with pytest.raises(GeometryError, match="oblique"):
        write_review(tmp_path / "review.html", CTVolume(np.zeros((8, 8, 8), np.int16), geometry), ())
    assert list(tmp_path.iterdir()) == []


def test_rois_become_regions(tmp_path: Path) -> None:
    box = np.ones((1, 2, 2), np.bool_)
    rois = (
        Roi("LT PAROTID", None, (1, 2, 3), box),
        Roi("PTV 70", (250, 0, 0), (0, 0, 0), box),
        Roi("Cord", (1, 2, 3), (0, 0, 0), np.zeros((0, 0, 0), np.bool_), "3 contours do not lie on a slice"),
    )
    geometry = VolumeGeometry((4, 8, 8), (1.0, 1.0, 1.0))
    regions, findings = regions_from_structure_set(StructureSet(geometry, rois, tuple(r.name for r in rois)))
    assert [r.structure and r.structure.name for r in regions] == ["Parotid_L", None, "SpinalCord"]
    assert [r.colour for r in regions] == [STRUCTURES["Parotid_L"].colour, (250, 0, 0), (1, 2, 3)]
    assert findings == (Finding("Cord", "could not be shown: 3 contours do not lie on a slice", None),)
    path = tmp_path / "review.html"
    write_review(path, CTVolume(np.zeros((4, 8, 8), np.int16), geometry), regions, reference=regions[:1])
    rows = json.loads(re.search(r'id="review-data">(.*?)</script>', path.read_text())[1])["structures"]  # type: ignore[index]
    assert [(row["name"], row["dice"], row["middle"]) for row in rows] == [
        ("LT PAROTID", 1.0, [3, 2, 1]),
        ("PTV 70", None, [0, 0, 0]),
        ("Cord", None, None),
    ]


def test_command_names_the_patient_only_when_asked(tmp_path: Path) -> None:
    volume, label_map = patient()
    (tmp_path / "study").mkdir()
    series = write_ct_series(tmp_path / "study", volume)
    drawn = tmp_path / "drawn.dcm"
    write_rtstruct(drawn, series, trace_contours(label_map), model_description="test")
    name = str(series.header.PatientName).replace("^", " ")
    run = CliRunner().invoke(main, ["review", str(tmp_path / "study"), str(drawn), "--reference", str(drawn)])
    assert run.exit_code == 0, run.output
    page = (tmp_path / "drawn.review.html").read_text()
    assert name not in page
    assert str(series.header.PatientID) not in page
    assert series.series_instance_uid not in page
    again = ["review", str(tmp_path / "study"), str(drawn), "--with-patient-header"]
    assert CliRunner().invoke(main, again).exit_code == 1
    assert CliRunner().invoke(main, [*again, "--overwrite"]).exit_code == 0
    assert name in (tmp_path / "drawn.review.html").read_text()
