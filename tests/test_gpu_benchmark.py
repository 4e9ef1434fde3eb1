"""benchmarks/gpu.py where no GPU is; and the padded network that it times, which must be the same network."""

import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from anatomynet.engine.folding import folded
from anatomynet.engine.padding import padded_network
from benchmarks import common, gpu
from benchmarks.gpu_earlier import PARTS, in_order, is_comparable, kept_of
from tests.random_network import random_network

ROOT = Path(__file__).resolve().parent.parent
ROUNDING = 1e-4  # of logits of about 10, in FP32


@pytest.mark.parametrize("multiple", [8, 16])
def test_padded_channels_change_nothing(multiple: int) -> None:
    x = torch.rand(1, 1, 8, 12, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    network = padded_network(random_network(), multiple)
    convolutions = [m for stage in (*network.encoder, *network.decoder) for m in stage.modules()]
    sides = {c for m in convolutions if isinstance(m, torch.nn.Conv3d) for c in m.weight.shape[:2]}
    assert all(side % multiple == 0 for side in sides)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), folded(random_network())(x), atol=ROUNDING, rtol=ROUNDING)


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1)
    assert "no NVIDIA GPU here" in run.stderr


def measure(part: str) -> str:
    """One part of a trial on a small volume; what was said on stderr."""
    arguments = f"--device cpu --slices 8 --side 32 --repeats 1 --part {part}".split()
    run = CliRunner().invoke(gpu.main, arguments, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    return run.stderr


def test_a_part_alone_is_added_to_what_this_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "measure_runtime", lambda trial: trial.result.update(runtime="measured"))
    monkeypatch.setattr(gpu, "measure_profile", lambda trial: trial.result.update(profile="measured"))
    file = tmp_path / "gpu_trial.json"
    measure("runtime")
    first = json.loads(file.read_text())
    assert [*first["part_seconds"]] == ["runtime"]
    assert "earlier" not in first
    first["machine"]["date"] = "2026-01-01"
    file.write_text(json.dumps(first))

    assert "replaced" not in measure("profile")
    second = json.loads(file.read_text())
    assert (second["runtime"], second["profile"]) == ("measured", "measured")
    assert second["earlier"] == {"runtime": "2026-01-01"}

    second["machine"]["gpu"] = "another"
    file.write_text(json.dumps(second))
    assert "gpu_trial.json is of another machine" in measure("profile")
    third = json.loads(file.read_text())
    assert third["profile"] == "measured"
    assert not {"runtime", "earlier"} & third.keys()


def test_what_goes_and_what_stays_when_parts_are_measured_again() -> None:
    before = {
        "machine": {"date": "2026-02-02"},
        "forms": {"FP32": 1, "FP16": 2, "FP16, tensor-core form, CUDA graph": 3, "ONNX Runtime, FP16 file": 4},
        "part_seconds": {"forms": 1, "form FP32": 1, "served": 2, "graphs": 3, "form CUDA graph": 3},
        "not_measured": {"compiled": "no time was left", "form FP16, plain, channels last, torch.compile": "late"},
        "served_on": "a GPU",
        "served": {"1 clients": 5},
        "servers": {"served": 6, "study": 7},
        "earlier": {"forms": "2026-01-01"},
    }
    assert kept_of(before, ("graphs", "served", "compiled")) == {
        "forms": {"FP32": 1, "FP16": 2, "ONNX Runtime, FP16 file": 4},
        "part_seconds": {"forms": 1, "form FP32": 1},
        "servers": {"study": 7},
        "earlier": {"forms": "2026-01-01"},
    }
    assert kept_of(before, ("forms",))["earlier"] == {"served": "2026-02-02", "graphs": "2026-02-02"}
    assert kept_of(before, PARTS) == {}


@pytest.mark.parametrize(("key", "value"), [("stride", 4), ("machine", {"date": "b", "gpu": "H100"}), ("repeats", 2)])
def test_results_of_something_else_are_not_comparable(key: str, value: object) -> None:
    before: dict[str, Any] = {"machine": {"date": "a", "gpu": "H200"}, "shape": [1, 2, 3], "stride": 1, "repeats": 5}
    now = before | {"machine": {"date": "b", "gpu": "H200"}, "served": {}}
    assert is_comparable(before, now)
    assert not is_comparable(before, now | {key: value})


@pytest.mark.parametrize(("parts", "baselines"), [(["graphs"], 1), (["study"], 0), (["forms", "graphs"], 0), ([], 0)])
def test_forms_measured_alone_are_held_against_fp32(
    parts: list[str], baselines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    trial: Any = type("T", (), {"stop": float("inf"), "result": {}})()
    study: Any = None
    monkeypatch.setattr(gpu, "measure_baseline", lambda trial: called.append("baseline"))
    monkeypatch.setattr(gpu, "guarded", lambda trial, name, measure: called.append(name))
    gpu.measure_parts(trial, study, parts)
    assert called == ["baseline"] * baselines + (parts or [*PARTS])


# As of a run that was cut short: what is not among the first came to nothing.
CUT_SHORT: dict[str, Any] = {
    "forms": {"FP32": 1},
    "runtime": "before",
    "profile": "before",
    "part_seconds": dict.fromkeys(("forms", "runtime", "labels", "served", "profile", "ONNX Runtime"), 1.0),
    "not_measured": {"ONNX Runtime": "no CUDA", "compiled": "no time was left"},
    "earlier": {"runtime": "2026-01-01", "profile": "2026-01-01"},
}


def parts_of(trial: Any, monkeypatch: pytest.MonkeyPatch, **measures: Any) -> list[str]:
    """What all parts were measured in which order, each by nothing but what is given here."""
    called: list[str] = []

    def measure(name: str, trial: Any) -> None:
        called.append(name)
        if name in measures:
            measures[name](trial.result)

    study: Any = None
    monkeypatch.setattr(gpu, "measure_baseline", lambda trial: called.append("baseline"))
    monkeypatch.setattr(gpu, "parts", lambda study: {name: partial(measure, name) for name in PARTS})
    gpu.measure_parts(trial, study, ())
    return called


def trial_until(stop: float, result: dict[str, Any]) -> Any:
    return type("T", (), {"stop": stop, "result": copy.deepcopy(result), "write": lambda self: None})()


def test_what_the_file_has_not_comes_first() -> None:
    new = ["study", "graphs", "ONNX Runtime", "compiled"]
    assert in_order(CUT_SHORT, ()) == [*new, "forms", "runtime", "labels", "served", "profile"]
    assert in_order(CUT_SHORT, ("served", "forms")) == ["forms", "served"]
    assert in_order({}, ()) == [*PARTS]


def test_what_the_file_has_stays_where_no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = trial_until(-1.0, CUT_SHORT)
    assert parts_of(trial, monkeypatch) == ["baseline", "study"]
    late = dict.fromkeys(("graphs", "ONNX Runtime", "compiled"), "no time was left")
    assert trial.result["not_measured"] == late
    assert (trial.result["runtime"], trial.result["earlier"]) == ("before", CUT_SHORT["earlier"])
    assert [*trial.result["part_seconds"]] == [*CUT_SHORT["part_seconds"], "study"]


def test_what_is_measured_anew_replaces_what_was_there_unless_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(result: dict[str, Any]) -> None:
        result["profile"] = "half"
        raise RuntimeError("the graph left the GPU unfit")

    trial = trial_until(float("inf"), CUT_SHORT)
    called = parts_of(trial, monkeypatch, runtime=lambda result: result.update(runtime="now"), profile=fail)
    assert called == ["baseline", *in_order(CUT_SHORT, ())]
    assert (trial.result["runtime"], trial.result["profile"]) == ("now", "before")
    assert trial.result["earlier"] == {"profile": "2026-01-01"}
    assert "not_measured" not in trial.result
