"""The accuracy benchmark counts what it should: by hand, and with a network that draws the truth or nothing."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from anatomynet.engine.checkpoint import save_checkpoint
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.data import Case
from anatomynet.engine.errors import ModelError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.metrics import Agreement
from anatomynet.engine.network import AnatomyNet
from anatomynet.engine.volume import CTVolume, HounsfieldArray, LabelArray
from anatomynet.engine.volume_files import write_nrrd
from benchmarks import accuracy, common
from benchmarks.accuracy import (
    CAUTION,
    INTERVAL,
    MEASURES,
    PUBLISHED,
    RESAMPLINGS,
    agreements_of,
    opened_runtime,
    runtime_from_checkpoint,
    summary,
    table,
    write_box_plot,
)

NAMES = ("BrainStem", "Parotid_L", "Parotid_R")
MODEL = ModelConfig("test", NAMES, 1, (1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (-250.0, 550.0))
GEOMETRY = VolumeGeometry((16, 24, 24), (1.5, 1.5, 2.5))
LABEL_HU = 100  # label i is drawn with i times as many Hounsfield units


def agreement(structure: str, dice: float, outcome: str = "found") -> Agreement:
    return Agreement(structure, outcome, dice, dice, 2.5, 100 * (1 - dice), 1.0, 50.0, 10.0, 10.0)  # type: ignore[arg-type]


def rows_of(cases: list[dict[str, Agreement]], names: Iterable[str] = NAMES) -> dict[str, dict[str, Any]]:
    return {row["structure"]: row for row in summary(cases, names, np.random.default_rng(1))}


CASES = [
    {"BrainStem": agreement("BrainStem", 0.8), "Parotid_L": agreement("Parotid_L", 0.9)},
    {"BrainStem": agreement("BrainStem", 0.6)},
    {"BrainStem": agreement("BrainStem", 0.0, "missed")},
]


def test_a_miss_counts_and_what_is_not_annotated_does_not() -> None:
    rows = rows_of(CASES)
    stem, left, right = (rows[name] for name in NAMES)
    assert (stem["cases"], stem["missed"]) == (3, 1)
    assert (left["cases"], left["missed"]) == (1, 0)
    assert (right["cases"], right["missed"]) == (0, 0)
    assert stem["dice"]["mean"] == pytest.approx(1.4 / 3, abs=1e-4)
    assert stem["dice"]["median"] == 0.6
    assert stem["dice"]["values"] == [0.8, 0.6, 0.0]
    assert stem["hd95_mm"]["mean"] == pytest.approx((20 + 40 + 100) / 3, abs=1e-4)
    assert right["dice"] == {"mean": None, "interval": None, "median": None, "values": []}


def test_every_structure_counts_the_same_in_the_mean() -> None:
    mean = rows_of(CASES)["mean"]
    assert (mean["cases"], mean["missed"]) == (4, 1)
    assert mean["dice"]["mean"] == pytest.approx((1.4 / 3 + 0.9) / 2, abs=1e-4)


def test_the_interval_is_that_of_resampled_patients() -> None:
    random = np.random.default_rng(0)
    values = random.normal(0.7, 0.1, 40)
    cases = [{"BrainStem": agreement("BrainStem", float(value))} for value in values]
    low, high = rows_of(cases, ["BrainStem"])["BrainStem"]["dice"]["interval"]
    means = random.choice(values, (RESAMPLINGS, 40)).mean(axis=1)  # the plain bootstrap
    assert (low, high) == pytest.approx(tuple(np.percentile(means, INTERVAL)), abs=0.01)
    assert rows_of(cases, ["BrainStem"]) == rows_of(cases, ["BrainStem"])  # seeded


class Draws:
    """A runtime that draws what the Hounsfield units say, or what it is told to leave out."""

    description = "by hand"

    def __init__(self, model: ModelConfig = MODEL, *, without: int = 0) -> None:
        self.model = model
        self.without = without

    def infer(self, hu: HounsfieldArray) -> tuple[LabelArray, NDArray[np.float32]]:
        labels = (hu.clip(0) // LABEL_HU).astype(np.uint8)
        labels[labels == self.without] = 0
        return labels, np.ones(len(self.model.structures), np.float32)


def case_of(geometry: VolumeGeometry = GEOMETRY) -> Case:
    labels = np.zeros(geometry.shape, np.uint8)
    for label, box in enumerate((np.s_[4:8, 10:14, 10:14], np.s_[4:9, 8:14, 17:22], np.s_[4:9, 8:14, 2:7]), start=1):
        labels[box] = label
    hu = labels.astype(np.int16) * LABEL_HU
    return Case("by_hand", CTVolume(hu, geometry), labels, (True, True, False))


@pytest.mark.parametrize("stride", [1, 4])
def test_a_network_that_draws_the_truth_agrees_with_it(stride: int) -> None:
    """Stride 4: on a CT that was reduced 4 x 4, as OpenKBP is."""
    model = replace(MODEL, in_plane_stride=stride)
    geometry = replace(GEOMETRY, spacing=(1.5 * stride, 1.5 * stride, 2.5))
    found = agreements_of(case_of(geometry), Draws(model))
    assert set(found) == {"BrainStem", "Parotid_L"}  # the right parotid is not annotated
    assert all(a.dice == a.surface_dice == 1 and a.hd95_mm == a.added_path_length_mm == 0 for a in found.values())


def test_a_structure_that_is_not_drawn_is_a_miss() -> None:
    found = agreements_of(case_of(), Draws(without=2))
    assert found["Parotid_L"].outcome == "missed"
    assert found["Parotid_L"].dice == 0
    assert found["BrainStem"].outcome == "found"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "test.safetensors", AnatomyNet(MODEL.classes), MODEL)
    return tmp_path / "test.safetensors"


def test_a_mirrored_checkpoint_draws_something_else(checkpoint: Path) -> None:
    hu = np.random.default_rng(0).integers(-250, 550, (8, 16, 16)).astype(np.int16)
    plain, mirrored = (runtime_from_checkpoint(checkpoint, mirror=mirror).infer(hu)[0] for mirror in (False, True))
    assert plain.shape == mirrored.shape
    assert not np.array_equal(plain, mirrored)


@pytest.mark.parametrize(
    ("checkpoint", "url", "mirror", "complaint"),
    [
        ("model.onnx", None, True, "--mirror averages probabilities"),
        ("model.safetensors", "localhost:8001", False, "without --checkpoint and --mirror"),
        (None, "localhost:8001", True, "without --checkpoint and --mirror"),
        ("absent.safetensors", None, False, "no checkpoint"),
        ("absent.onnx", None, False, "no model"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    checkpoint: str | None, url: str | None, mirror: bool, complaint: str
) -> None:
    path = Path(checkpoint) if checkpoint else None
    with pytest.raises(ModelError, match=complaint), opened_runtime(path, url=url, mirror=mirror):
        pass


@pytest.fixture
def result() -> dict[str, object]:
    rows = summary(CASES, NAMES, np.random.default_rng(1))
    return {"checkpoint_sha256": "ab" * 32, "cases": 3, "data": "by/hand", "structures": rows, "published": PUBLISHED}


def test_the_table_says_what_may_not_be_compared(result: dict[str, object]) -> None:
    lines = list(table(result))
    assert lines[0] == "checkpoint abababababab on 3 cases of by/hand"
    assert [line.split()[0] for line in lines[2:6]] == [*NAMES, "mean"]
    assert all(title in lines[1] for title, _ in MEASURES.values())
    assert lines[1].index("DSC, median") < lines[1].index("surface DSC")
    stem = " ".join(lines[2].split())
    assert stem.startswith("BrainStem 3 1 0.467 (0.000 to 0.800) 0.600 0.467 ")
    assert " 53.3 (20.0 to 100.0) 40.0 " in stem
    assert "not annotated" in lines[4]
    for name in ("MICCAI 2015", "AnatomyNet", "UaNet"):
        assert any(name in line for line in lines[6:])
    assert lines[-1] == CAUTION
    assert all(paper["source"] for paper in PUBLISHED)


def test_the_box_plot_is_a_picture(result: dict[str, object], tmp_path: Path) -> None:
    write_box_plot(tmp_path / "plot.png", result)
    from matplotlib.image import imread

    assert imread(tmp_path / "plot.png")[..., :3].std() > 0.02


def test_the_command_measures_a_folder(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (accuracy, common):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    case = case_of()
    for name in ("a", "b"):
        (tmp_path / "data" / name / "structures").mkdir(parents=True)
        write_nrrd(tmp_path / "data" / name / "img.nrrd", case.volume.hu, GEOMETRY)
        for label, structure in enumerate(NAMES[:2], start=1):
            mask = (case.labels == label).astype(np.uint8)
            write_nrrd(tmp_path / "data" / name / "structures" / f"{structure}.nrrd", mask, GEOMETRY)
    (tmp_path / "data" / "broken").mkdir()
    (tmp_path / "data" / "broken" / "img.nrrd").write_bytes(b"broken")
    arguments = [str(tmp_path / "data"), "--checkpoint", str(checkpoint), "--name", "tiny", "--plot"]
    outcome = CliRunner().invoke(accuracy.main, arguments)
    assert outcome.exit_code == 0, outcome.output
    written = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert (written["cases"], written["structures"][0]["cases"], written["structures"][2]["cases"]) == (2, 2, 0)
    assert written["left_out"] == ["broken"]
    assert "left out broken: " in outcome.stderr
    assert "1 case left out: broken" in outcome.stdout
    assert written["runtime"].startswith("PyTorch")
    assert (tmp_path / "results" / "tiny.png").is_file()
    assert "no case in" in CliRunner().invoke(accuracy.main, [str(tmp_path / "results")]).stderr
    for name in ("a", "b"):
        (tmp_path / "data" / name / "img.nrrd").write_bytes(b"broken")
    assert "error: none of 3 cases can be measured" in CliRunner().invoke(accuracy.main, arguments).stderr
