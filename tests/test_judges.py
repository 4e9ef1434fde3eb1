"""Every way in which slices can lie along the patient's axes: the judges find no error, plastimatch the same voxels."""

from pathlib import Path

import numpy as np
import pytest

from anatomynet.client.contours import exact_tolerance_mm, trace_contours
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.seg import write_seg
from anatomynet.client.study import CTSeries, read_ct_series
from anatomynet.engine.geometry import Direction
from anatomynet.engine.metrics import dice
from anatomynet.engine.volume import LabelMap
from tests.dicom_studies import (
    all_directions,
    errors_of_judges,
    masks_by_plastimatch,
    on_grid,
    random_volume,
    write_study,
)
from tests.enhanced_studies import write_enhanced
from tests.test_rtstruct import CATALOGUE, SHAPE, hard_labels

SMALLEST_DSC = 0.999
# Slices stand in the order of row direction x column direction: an image's rows and columns are all that varies.
DIRECTIONS = [direction for direction in all_directions() if np.linalg.det(direction) > 0]


def name_of(direction: Direction) -> str:
    """Where columns, rows and slices lead, as L, P, H and their opposites."""
    axes = np.array(direction).T
    return "".join(("LPH" if axis.sum() > 0 else "RAF")[int(np.abs(axis).argmax())] for axis in axes)


def drawn_on(series: CTSeries, folder: Path) -> list[Path]:
    """RTSTRUCT and SEG of every hard shape, as `segment` writes them."""
    label_map = LabelMap(hard_labels(), series.geometry, CATALOGUE)
    contours = trace_contours(label_map, tolerance_mm=exact_tolerance_mm(series.geometry))
    write_rtstruct(folder / "rs.dcm", series, contours)
    write_seg(folder / "seg.dcm", series, label_map)
    return [folder / "rs.dcm", folder / "seg.dcm"]


def test_all_orientations_are_tried() -> None:
    assert len({name_of(direction) for direction in DIRECTIONS}) == 24


@pytest.mark.parametrize("direction", DIRECTIONS, ids=name_of)
def test_no_judge_finds_an_error_and_every_structure_comes_back(tmp_path: Path, direction: Direction) -> None:
    pytest.importorskip("highdicom")
    write_study(tmp_path / "study", random_volume(SHAPE, direction))
    series = read_ct_series(tmp_path / "study")
    results = drawn_on(series, tmp_path)
    assert errors_of_judges(series, *results) == []
    masks = masks_by_plastimatch(results[0], tmp_path / "study", tmp_path / "masks")
    assert masks.keys() == {structure.tg263_name for structure in CATALOGUE}
    for label, structure in enumerate(CATALOGUE, start=1):
        found = on_grid(*masks[structure.tg263_name], series.geometry)
        assert dice(found, hard_labels() == label) >= SMALLEST_DSC, structure.name


@pytest.mark.parametrize("direction", DIRECTIONS, ids=name_of)
def test_no_judge_finds_an_error_on_an_enhanced_ct(tmp_path: Path, direction: Direction) -> None:
    pytest.importorskip("highdicom")
    write_enhanced(tmp_path / "study" / "ct", random_volume(SHAPE, direction))
    series = read_ct_series(tmp_path / "study")
    assert errors_of_judges(series, *drawn_on(series, tmp_path)) == []
