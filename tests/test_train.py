"""Training learns, can be interrupted at any step, and says in one line why it cannot start."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import nrrd
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from anatomynet.engine.augmentation import Sample
from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.config import ModelConfig, TrainConfig, load_config
from anatomynet.engine.data import Case, read_case
from anatomynet.engine.errors import DataError, ModelError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.region import RegionConfig
from anatomynet.engine.region_runtime import EmbeddedRegionFinder
from anatomynet.engine.runtime import TorchRuntime
from anatomynet.engine.stops import STOPS
from anatomynet.engine.survey import Survey
from anatomynet.engine.train import (
    cases_to_learn_from,
    chosen_by_structure,
    main,
    samples,
    validate,
)
from anatomynet.engine.training import Training
from anatomynet.engine.volume import CTVolume, HounsfieldArray
from tests import synthetic_head

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (8, 16, 24)
STRUCTURES = ("Chiasm", "OpticNerve_L", "OpticNerve_R")  # whose usual size no table knows: this head is small
STEPS, STEPS_PER_EPOCH = 20, 5
INTERRUPTED_AFTER = 7
LEARNT = 0.5  # share of the first step's loss that may be left after the last: 0.06 to 0.21 of it were, by six seeds
HEADER = {
    "space": "left-posterior-superior",
    "space directions": np.diag([1.5, 1.5, 2.5]),
    "space origin": [0.0, 0.0, 0.0],
}
WAIT_S = 240  # for a process on a busy machine
CONFIG = f"""
[model]
name = "tiny"
structures = ["Chiasm", "OpticNerve_L", "OpticNerve_R"]
in_plane_stride = 1
smallest_spacing = [1.0, 1.0, 2.0]
largest_spacing = [2.0, 2.0, 3.0]
hu_window = [-250.0, 550.0]

[train]
steps = {STEPS}
steps_per_epoch = {STEPS_PER_EPOCH}
warmup_steps = 2
learning_rate = 5e-3
crop = [8, 16, 16]
whole_share = 0.2
phantom_share = 0.0
ema_decay = 0.8
frozen_norm_share = 0.2
missing = "mask"
precision = "float32"
"""


def write_case(
    folder: Path, shift: int, structures: tuple[str, ...] = ("Chiasm", "OpticNerve_L", "OpticNerve_R")
) -> None:
    """A small head: three boxes, each of its own Hounsfield units, moved along y by `shift`."""
    hu = np.full(SHAPE, -50, np.int16)
    hu[0, 0, -1] = -1000  # no CT is without air
    boxes = {
        "Chiasm": (250, np.s_[2:7, 1 + shift : 6 + shift, 9:15]),
        "OpticNerve_L": (400, np.s_[2:7, 7 + shift : 12 + shift, 17:22]),
        "OpticNerve_R": (550, np.s_[2:7, 7 + shift : 12 + shift, 2:7]),
    }
    (folder / "structures").mkdir(parents=True)
    for name, (brightness, box) in boxes.items():
        hu[box] = brightness
        if name in structures:
            mask = np.zeros(SHAPE, np.uint8)
            mask[box] = 1
            nrrd.write(str(folder / "structures" / f"{name}.nrrd"), mask, HEADER, index_order="C")
    nrrd.write(str(folder / "img.nrrd"), hu, HEADER, index_order="C")


def write_archive(folder: Path) -> Path:
    """Two cases to train on, one of them without a right optic nerve, and one to validate."""
    write_case(folder / "train" / "a", 0)
    write_case(folder / "train" / "b", 3, ("Chiasm", "OpticNerve_L"))
    write_case(folder / "validation" / "c", 2)
    (folder / "tiny.toml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("data"))


def train(data: Path, output: Path, *options: str) -> Result:
    return CliRunner().invoke(
        main, ["--data", str(data), "--config", str(data / "tiny.toml"), "--output", str(output), *options]
    )


def refusal(result: Result) -> str:
    """The one line on stderr of a command that cannot start."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line and "reading" not in line]  # tqdm's bars
    assert len(lines) == 1
    return lines[0]


def rows_of(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def state_of(path: Path) -> tuple[int, dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("run") / "tiny.safetensors"
    result = train(data, output)
    assert result.exit_code == 0, result.output
    assert "best mean validation DSC" in result.stdout
    return output


def test_the_loss_falls(data: Path) -> None:
    """On one sample, seen again and again: crops of a few cases differ more than so few steps teach."""
    model, recipe = load_config(data / "tiny.toml")
    case = read_case(data / "train" / "a", model.structures)
    training = Training(model, recipe, torch.device("cpu"))
    sample = next(samples([case], model, recipe, first=0))
    losses = [training.learn(sample) for _ in range(STEPS)]
    assert losses[-1] < LEARNT * losses[0], losses


def test_log_checkpoint_and_state_are_written_and_nothing_else(trained: Path) -> None:
    assert sorted(path.name for path in trained.parent.iterdir()) == [
        "tiny.cases.csv",
        "tiny.csv",
        *(["tiny.png"] if find_spec("matplotlib") else []),
        "tiny.safetensors",
        "tiny.state.safetensors",
        *(["tiny.tensorboard"] if find_spec("tensorboardX") else []),
    ]
    rows = rows_of(trained.with_suffix(".csv"))
    assert [row["step"] for row in rows] == list(range(STEPS_PER_EPOCH, STEPS + 1, STEPS_PER_EPOCH))
    assert list(rows[0]) == ["step", "loss", "mean", "Chiasm", "OpticNerve_L", "OpticNerve_R"]
    assert rows[-1]["mean"] == pytest.approx(np.mean(list(rows[-1].values())[3:]), abs=2e-4)
    assert state_of(trained.with_suffix(".state.safetensors"))[0] == STEPS


def test_the_checkpoint_can_be_served(data: Path, trained: Path) -> None:
    network, config = load_checkpoint(trained)
    learnt = replace(load_config(data / "tiny.toml")[0], patients=(2, 2, 1))  # b has no right optic nerve
    assert replace(config, checkpoint_sha256="") == learnt
    labels, confidence = TorchRuntime(network, config).infer(np.zeros((16, 16, 16), np.int16))
    assert labels.shape == (16, 16, 16)
    assert confidence.shape == (3,)


class FixedFinder:
    """Finds the same box of coarse voxels in every CT."""

    def __init__(self, box: tuple[int, ...], model: ModelConfig) -> None:
        self.config = RegionConfig(model.structures, (1.5, 1.5, 2.5), model.hu_window, threshold=0.0, margin=(1, 1, 1))
        self.box = box

    def find(self, coarse: HounsfieldArray) -> NDArray[np.int64]:
        assert coarse.shape == (24, 48, 48)
        return np.array(self.box)


class Bright(nn.Module):
    """Calls what is bright a left parotid, and remembers how much it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shown.append(tuple(x.shape[2:]))
        logits = x.new_zeros(1, 4, *x.shape[2:])
        logits[:, synthetic_head.LEFT] = (x[:, 0] > 0.9) * 2 - 1
        return logits


@pytest.mark.parametrize(
    ("structures", "shown"), [(synthetic_head.STRUCTURES, (24, 40, 38)), (("Larynx",), (24, 48, 48))]
)
def test_validation_draws_what_a_region_finder_that_knows_the_structures_cuts(
    structures: tuple[str, ...], shown: tuple[int, ...]
) -> None:
    network, case = Bright(), synthetic_head.head()
    finder = FixedFinder((0, 4, 12, 24, 44, 48), replace(synthetic_head.MODEL, structures=structures))
    model = replace(synthetic_head.MODEL, patients=(0, 9, 0))  # what else it does not find is not looked for
    scores = validate(network, model, [case], "cpu", region_finder=finder)
    assert network.shown == [shown]
    assert scores["Parotid_L"] == [1.0]


@pytest.mark.parametrize("region_share", [0.0, 0.5])
def test_weights_that_learn_its_crops_are_chosen_by_the_region_finders_boxes(
    region_share: float, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened once, however often is validated."""
    given: list[object] = []
    opened: list[EmbeddedRegionFinder] = []

    def open_finder() -> EmbeddedRegionFinder:
        opened.append(EmbeddedRegionFinder())
        return opened[-1]

    def validated(*_: object, region_finder: object) -> dict[str, list[float]]:
        given.append(region_finder)
        return {name: [0.5] for name in STRUCTURES}

    monkeypatch.setattr("anatomynet.engine.train.EmbeddedRegionFinder", open_finder)
    monkeypatch.setattr("anatomynet.engine.train.validate", validated)
    result = train_on_regions(data, tmp_path, region_share=region_share)
    assert result.exit_code == 0, result.output
    assert len(opened) == (region_share > 0)
    expected: list[object] = [*opened] or [None]
    assert given == expected * 2


def train_on_regions(data: Path, folder: Path, *options: str, region_share: float = 0.5) -> Result:
    """A run of two epochs, of one step each."""
    toml = CONFIG.replace("[train]", f"[train]\nregion_share = {region_share}")
    toml = toml.replace(f"steps_per_epoch = {STEPS_PER_EPOCH}", "steps_per_epoch = 1")
    (folder / "regions.toml").write_text(toml)
    names = {"--data": data, "--config": folder / "regions.toml", "--output": folder / "tiny.safetensors"}
    arguments = [str(part) for pair in names.items() for part in pair]
    return CliRunner().invoke(main, [*arguments, "--steps", "2", *options])


def test_a_region_finder_that_cannot_be_opened_is_told_before_a_case_is_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where neither OpenVINO nor ONNX Runtime is installed: not after an epoch."""
    for name in ("openvino", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("anatomynet.engine.train.survey_archive", lambda *_, **__: pytest.fail("read"))
    assert "nothing here can run region.onnx" in refusal(train_on_regions(data, tmp_path))


# Gets Ctrl-C in the middle of its second epoch, however fast it is.
INTERRUPTED = f"""
import signal
from anatomynet.engine.train import main
from anatomynet.engine.training import Training
learn = Training.learn
def learn_and_interrupt(training, sample):
    loss = learn(training, sample)
    if training.step == {INTERRUPTED_AFTER}:
        signal.raise_signal(signal.SIGINT)
    return loss
Training.learn = learn_and_interrupt
main()
"""


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(data: Path, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "tiny.safetensors"
    log, state = output.with_suffix(".csv"), output.with_suffix(".state.safetensors")
    options = ["--data", str(data), "--config", str(data / "tiny.toml"), "--output", str(output)]
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=WAIT_S,
        check=False,
    )
    assert run.returncode == 130, run.stderr
    assert "Traceback" not in run.stderr
    assert state_of(state)[0] == INTERRUPTED_AFTER

    resumed = train(data, output, "--resume")
    assert resumed.exit_code == 0, resumed.output
    step, tensors = state_of(state)
    expected_step, expected = state_of(trained.with_suffix(".state.safetensors"))
    assert step == expected_step
    assert tensors.keys() == expected.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])] == []
    assert output.read_bytes() == trained.read_bytes()
    assert log.read_bytes() == trained.with_suffix(".csv").read_bytes()  # the loss of the broken epoch too


@pytest.fixture
def signals_as_usual() -> Iterator[None]:
    """Whoever starts the tests in the background has some ignored."""
    usual = {signal.SIGINT: signal.default_int_handler} | dict.fromkeys(STOPS, signal.SIG_DFL)
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def sending(*numbers: int, step: int) -> Callable[[Training, Sample], Tensor]:
    """`Training.learn`, in whose step `step` the process is sent these signals."""
    learn = Training.learn

    def learn_and_send(training: Training, sample: Sample) -> Tensor:
        if training.step == step - 1:
            for number in numbers:
                signal.raise_signal(number)  # in this thread, so now: os.kill may come to another one, and late
        return learn(training, sample)

    return learn_and_send


@pytest.mark.usefixtures("signals_as_usual")
@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_run_that_is_stopped_saves_the_step_under_way(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, status: int
) -> None:
    """By Ctrl-C, by a batch system or `docker stop`, by a terminal that is closed."""
    output = tmp_path / trained.name
    with monkeypatch.context() as patch:
        patch.setattr(Training, "learn", sending(stop, step=7))
        assert train(data, output).exit_code == status
    assert state_of(output.with_suffix(".state.safetensors"))[0] == 7
    resumed = train(data, output, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert output.read_bytes() == trained.read_bytes()
    assert output.with_suffix(".csv").read_bytes() == trained.with_suffix(".csv").read_bytes()


@pytest.mark.usefixtures("signals_as_usual")
@pytest.mark.parametrize(
    ("stop", "status", "saved"), [(signal.SIGINT, 130, STEPS_PER_EPOCH), (signal.SIGTERM, 143, STEPS_PER_EPOCH + 1)]
)
def test_only_a_second_ctrl_c_ends_a_run_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, status: int, saved: int
) -> None:
    """`timeout` sends SIGTERM to its command and to the group that it is in."""
    monkeypatch.setattr(Training, "learn", sending(stop, stop, step=STEPS_PER_EPOCH + 1))
    assert train(data, tmp_path / "tiny.safetensors").exit_code == status
    assert state_of(tmp_path / "tiny.state.safetensors")[0] == saved


@pytest.mark.usefixtures("signals_as_usual")
def test_a_run_under_nohup_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(Training, "learn", sending(signal.SIGHUP, step=1))
    assert train(data, tmp_path / "tiny.safetensors", "--steps", "2").exit_code == 0


def test_no_state_that_has_diverged_takes_a_good_ones_place(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = Training.learn

    def diverging(training: Training, sample: Sample) -> Tensor:
        return learn(training, sample) * (math.nan if training.step == 3 else 1)

    monkeypatch.setattr(Training, "learn", diverging)
    monkeypatch.setattr("anatomynet.engine.train.SAVED_EVERY_S", 0.0)
    result = train(data, tmp_path / "tiny.safetensors")
    assert result.stderr.splitlines()[-1].startswith("error: the loss is nan after 3 steps: training has diverged")
    assert state_of(tmp_path / "tiny.state.safetensors")[0] == 2


def test_a_run_interrupted_before_its_first_validation_goes_on(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a state by then, and no best checkpoint yet."""
    output = tmp_path / "tiny.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("anatomynet.engine.train._Interruptible.asked", signal.SIGINT)
        assert train(data, output).exit_code != 0
    assert not output.exists()
    assert state_of(output.with_suffix(".state.safetensors"))[0] == 1
    resumed = train(data, output, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert output.read_bytes() == trained.read_bytes()


def test_a_finished_run_has_nothing_to_resume(data: Path, trained: Path) -> None:
    before = trained.read_bytes()
    assert train(data, trained, "--resume").exit_code == 0
    assert trained.read_bytes() == before


def test_a_new_run_starts_a_new_log(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "again.safetensors"
    for _ in range(2):
        assert train(data, output, "--steps", "1", "--overwrite").exit_code == 0
    assert [row["step"] for row in rows_of(output.with_suffix(".csv"))] == [1]


def test_a_new_run_leaves_nothing_of_the_old_one_from_its_first_step_on(
    data: Path, resumable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended before its first validation, it has no weights, and no curves."""
    monkeypatch.setattr("anatomynet.engine.train._Interruptible.asked", signal.SIGINT)
    assert train(data, resumable, "--overwrite").exit_code != 0
    assert state_of(resumable.with_suffix(".state.safetensors"))[0] == 1
    assert set(files_of(resumable)) == {"tiny.cases.csv", "tiny.state.safetensors"}


def test_a_run_may_begin_with_the_weights_that_it_replaces(
    data: Path, resumable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay until they have been validated."""

    def interrupted(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    before = resumable.read_bytes()
    monkeypatch.setattr("anatomynet.engine.train.validate", interrupted)
    assert train(data, resumable, "--overwrite", "--from", str(resumable)).exit_code != 0
    assert resumable.read_bytes() == before
    assert not resumable.with_suffix(".state.safetensors").exists()


@pytest.mark.parametrize(
    ("left", "advice"),
    [
        ("tiny.safetensors", "without a state to go on from: give --overwrite to lose it"),
        ("tiny.state.safetensors", "give --resume to go on with it, --overwrite to lose it"),
    ],
)
def test_a_run_is_never_lost_unasked(data: Path, trained: Path, tmp_path: Path, left: str, advice: str) -> None:
    """A night of training, and --resume forgotten."""
    (tmp_path / left).write_bytes((trained.parent / left).read_bytes())
    assert advice in refusal(train(data, tmp_path / trained.name))
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_what_was_before(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "tiny.safetensors"
    assert train(data, output, "--steps", str(STEPS_PER_EPOCH)).exit_code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    state = output.with_suffix(".state.safetensors")
    with safe_open(state, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors | {"network.classify.bias": torch.full((4,), torch.nan)}, state, metadata)
    broken = state.read_bytes()
    result = train(data, output, "--resume")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: the loss is nan after 10 steps: training has diverged")
    assert state.read_bytes() == broken
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before | {
        state.name: broken
    }


def test_a_log_that_someone_changed_is_told(data: Path, trained: Path, tmp_path: Path) -> None:
    """As a spreadsheet may."""
    for path in trained.parent.glob("tiny.*safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for text in (trained.with_suffix(".csv").read_bytes().replace(b",", b";"), b"\xff\xfe\0"):
        (tmp_path / "tiny.csv").write_bytes(text)
        complaint = refusal(train(data, tmp_path / trained.name, "--resume"))
        assert "tiny.csv is not the log that anatomynet-train wrote: move it away" in complaint


def test_a_structure_that_nobody_drew_cannot_be_chosen(data: Path) -> None:
    model, recipe = load_config(data / "tiny.toml")
    case = read_case(data / "train" / "b", model.structures)  # without a right optic nerve
    recipe = replace(recipe, class_weights=(1.0, 0.0, 0.0, 1.0), balanced_share=1.0)
    with pytest.raises(DataError, match="no case has a structure whose class weight is above 0"):
        chosen_by_structure([case], recipe, np.random.default_rng(0))


def test_even_a_run_that_learns_nothing_writes_what_it_announces(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anatomynet.engine.train.validate", lambda *_, **__: {name: [0.0] for name in STRUCTURES})
    output = tmp_path / "nothing.safetensors"
    assert train(data, output, "--steps", "1").exit_code == 0
    assert rows_of(output.with_suffix(".csv"))[0]["mean"] == 0
    assert output.is_file()


@pytest.mark.parametrize(
    ("line", "changed"), [("550.0", "600.0"), ("in_plane_stride = 1", "in_plane_stride = 2")], ids=["window", "stride"]
)
def test_resuming_with_another_configuration_is_refused(
    data: Path, trained: Path, tmp_path: Path, line: str, changed: str
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(CONFIG.replace(line, changed))
    result = CliRunner().invoke(
        main, ["--data", str(data), "--config", str(other), "--output", str(trained), "--resume"]
    )
    assert "another configuration" in refusal(result)


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("crop = [8, 16, 16]", "crop = [8, 16, 24]"),
        ("ema_decay", "seed = 3\nema_decay"),
        ("ema_decay", "region_share = 0.5\nema_decay"),
    ],
)
def test_resuming_by_another_recipe_is_refused(
    data: Path, trained: Path, tmp_path: Path, line: str, other: str
) -> None:
    (tmp_path / "other.toml").write_text(CONFIG.replace(line, other))
    options = ["--data", str(data), "--config", str(tmp_path / "other.toml"), "--output", str(trained), "--resume"]
    complaint = refusal(CliRunner().invoke(main, options))
    assert f"({other.split()[0]} " in complaint
    assert "start a new output" in complaint


def test_resuming_for_more_steps_is_possible(data: Path, trained: Path, tmp_path: Path) -> None:
    for path in filter(Path.is_file, trained.parent.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert train(data, tmp_path / trained.name, "--resume", "--steps", str(STEPS + 1)).exit_code == 0
    assert rows_of(tmp_path / "tiny.csv")[-1]["step"] == STEPS + 1


@pytest.fixture
def resumable(trained: Path, tmp_path: Path) -> Path:
    """The checkpoint of a finished run, all of it in a folder of its own."""
    folder = shutil.copytree(trained.parent, tmp_path / "run")
    return folder / trained.name


def files_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.parent.iterdir() if path.is_file()}


def exchange(archive: Path) -> None:
    (archive / "train").rename(archive / "between")
    (archive / "validation").rename(archive / "train")
    (archive / "between").rename(archive / "validation")


def add(archive: Path) -> None:
    write_case(archive / "train" / "d", 1)
    write_case(archive / "train" / "e", 4)


def remove(archive: Path) -> None:
    shutil.rmtree(archive / "train" / "b")


def damage(archive: Path) -> None:
    (archive / "train" / "b" / "img.nrrd").write_bytes(b"broken")


def draw_anew(archive: Path) -> None:
    shutil.rmtree(archive / "validation" / "c")
    write_case(archive / "validation" / "c", 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (exchange, "train: 1 case more (c), 2 cases fewer (a, b); validation: 2 cases more (a, b), 1 case fewer (c)"),
        (add, "train: 2 cases more (d, e)"),
        (remove, "train: 1 case fewer (b)"),
        (damage, "train: 1 case fewer (b)"),
        (draw_anew, "validation: 1 case changed (c)"),
    ],
)
def test_resuming_with_other_cases_is_refused(
    data: Path, resumable: Path, tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    """Patients that were learnt from would validate."""
    archive = shutil.copytree(data, tmp_path / "archive")
    change(archive)
    before = files_of(resumable)
    complaint = refusal(train(archive, resumable, "--resume", "--steps", str(STEPS + 1)))
    assert f"{archive} holds other cases than the run was begun with ({told}): " in complaint
    assert "start a new output" in complaint
    assert files_of(resumable) == before


def test_the_same_cases_elsewhere_are_the_same(data: Path, resumable: Path, tmp_path: Path) -> None:
    archive = shutil.copytree(data, tmp_path / "archive")
    result = train(archive, resumable, "--resume", "--steps", str(STEPS + 1))
    assert result.exit_code == 0, result.output


def test_of_many_other_cases_a_few_are_named(data: Path, resumable: Path, tmp_path: Path) -> None:
    archive = shutil.copytree(data, tmp_path / "archive")
    for number in range(6):
        write_case(archive / "train" / f"d{number}", 0)
    assert "6 cases more (d0, d1, d2, ...)" in refusal(train(archive, resumable, "--resume"))


def test_a_state_that_does_not_tell_its_cases_goes_on_and_says_so(data: Path, resumable: Path) -> None:
    """As runs wrote it that began before it did; from here on it tells."""
    state = resumable.with_suffix(".state.safetensors")
    with safe_open(state, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    cases = metadata.pop("cases")
    save_file(tensors, state, metadata)
    result = train(data, resumable, "--resume", "--steps", str(STEPS + 1))
    assert result.exit_code == 0, result.output
    assert f"{state} does not tell which cases it was trained on" in result.stderr
    with safe_open(state, "pt") as file:
        assert file.metadata()["cases"] == cases
    again = train(data, resumable, "--resume", "--steps", str(STEPS + 2))
    assert "does not tell" not in again.stderr


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("tiny.state.safetensors", b"", "nothing to resume"),
        ("tiny.safetensors", None, "is not there"),
        ("tiny.csv", b"step;loss\n5;0.5\n", "is not the log"),
    ],
)
def test_what_cannot_be_resumed_is_told_before_a_case_is_read(
    resumable: Path, data: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: bytes | None, complaint: str
) -> None:
    """And nothing that it left is written over, the report on its cases among it."""
    path = resumable.with_name(file)
    path.unlink() if text is None else path.write_bytes(text)
    resumable.with_suffix(".cases.csv").write_text("of that run")
    before = files_of(resumable)
    monkeypatch.setattr("anatomynet.engine.train.survey_archive", lambda *_, **__: pytest.fail("read"))
    assert complaint in refusal(train(data, resumable, "--resume", "--steps", str(STEPS + 1)))
    assert files_of(resumable) == before


def test_what_cannot_be_begun_with_is_told_before_a_case_is_read(
    resumable: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(resumable)
    monkeypatch.setattr("anatomynet.engine.train.survey_archive", lambda *_, **__: pytest.fail("read"))
    assert "expected the [model] of tiny" in refusal(train(data, resumable, "--overwrite", "--from", "openkbp7"))
    assert files_of(resumable) == before


def test_cases_at_full_size_do_not_stay_beside_those_that_are_cut() -> None:
    geometry = VolumeGeometry((24, 96, 96), (4.0, 4.0, 3.0))
    hu = np.full(geometry.shape, -1000, np.int16)
    hu[:, 32:64, 32:64] = 40
    volume = CTVolume(hu, geometry)
    cases = [Case(name, volume, np.zeros(geometry.shape, np.uint8), ()) for name in ("a", "b")]
    survey = Survey("train", cases, (), {})
    full = weakref.ref(hu)
    del hu, volume, cases
    first, second = cases_to_learn_from(survey)
    assert first.volume.geometry.shape < geometry.shape
    assert (first.name, second.name) == ("a", "b")
    assert full() is None


def test_a_row_that_was_logged_before_its_state_comes_once(data: Path, trained: Path, tmp_path: Path) -> None:
    """A run that is killed between the two logs its last epoch again."""
    for path in trained.parent.glob("tiny.*safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    log = trained.with_suffix(".csv").read_text()
    (tmp_path / "tiny.csv").write_text(log + log.splitlines()[-1].replace(str(STEPS), str(STEPS + 1), 1) + "\n")
    assert train(data, tmp_path / trained.name, "--resume", "--steps", str(STEPS + 1)).exit_code == 0
    assert [row["step"] for row in rows_of(tmp_path / "tiny.csv")] == [5, 10, 15, 20, 21]


def test_a_log_that_was_lost_begins_anew(data: Path, trained: Path, tmp_path: Path) -> None:
    for path in trained.parent.glob("tiny.*safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tiny.csv").touch()
    assert train(data, tmp_path / trained.name, "--resume", "--steps", str(STEPS + 1)).exit_code == 0
    assert [row["step"] for row in rows_of(tmp_path / "tiny.csv")] == [21]


def test_a_checkpoint_that_was_lost_is_told(data: Path, trained: Path, tmp_path: Path) -> None:
    """What comes may be worse than it was, and would not be written."""
    state = trained.with_suffix(".state.safetensors")
    (tmp_path / state.name).write_bytes(state.read_bytes())
    complaint = refusal(train(data, tmp_path / trained.name, "--resume", "--steps", str(STEPS + 1)))
    assert "tiny.safetensors, the best of this run so far, is not there" in complaint


def test_resuming_from_another_networks_state_is_refused(data: Path, trained: Path, tmp_path: Path) -> None:
    """As that of the baseline, whose [model] and [train] are the same."""
    state = trained.with_suffix(".state.safetensors")
    with safe_open(state, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    other = {name: tensor for name, tensor in tensors.items() if "classify" not in name}
    save_file(other, tmp_path / state.name, metadata)
    assert "holds another network" in refusal(train(data, tmp_path / trained.name, "--resume"))


def test_resuming_without_a_state_is_refused(data: Path, tmp_path: Path) -> None:
    complaint = refusal(train(data, tmp_path / "new.safetensors", "--resume"))
    assert f"nothing to resume: no state {tmp_path / 'new.state.safetensors'}" in complaint


@pytest.mark.parametrize("kept", [0, 100, 0.5])
def test_resuming_from_a_damaged_state_is_refused(data: Path, trained: Path, tmp_path: Path, kept: float) -> None:
    state = trained.with_suffix(".state.safetensors").read_bytes()
    (tmp_path / "t.state.safetensors").write_bytes(state[: int(kept * len(state)) if kept < 1 else int(kept)])
    assert "nothing to resume" in refusal(train(data, tmp_path / "t.safetensors", "--resume"))


def test_resuming_from_a_checkpoint_is_refused(data: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "t.state.safetensors").write_bytes(trained.read_bytes())
    assert "start a new output" in refusal(train(data, tmp_path / "t.safetensors", "--resume"))


def test_resuming_from_a_pickle_is_refused_unread(data: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"bomb": Bomb()}, tmp_path / "t.state.safetensors")
    assert "nothing to resume" in refusal(train(data, tmp_path / "t.safetensors", "--resume"))
    assert not (tmp_path / "exploded").exists()


def test_a_state_without_a_count_of_patients_can_be_resumed(data: Path, trained: Path, tmp_path: Path) -> None:
    """As runs wrote it that began before there was one."""
    with safe_open(trained.with_suffix(".state.safetensors"), "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    table = json.loads(metadata["model"])
    assert table.pop("patients") == [2, 2, 1]
    # Of the worst DSC, so that one more step writes a checkpoint over the one that is there.
    metadata |= {"model": json.dumps(table, sort_keys=True), "best": "-1.0"}
    save_file(tensors, tmp_path / "tiny.state.safetensors", metadata)
    (tmp_path / "tiny.safetensors").write_bytes(trained.read_bytes())
    result = train(data, tmp_path / "tiny.safetensors", "--resume", "--steps", str(STEPS + 1))
    assert result.exit_code == 0, result.output
    assert load_checkpoint(tmp_path / "tiny.safetensors")[1].patients == (2, 2, 1)


def test_a_state_older_than_the_region_finders_crops_saw_none(data: Path, trained: Path, tmp_path: Path) -> None:
    with safe_open(trained.with_suffix(".state.safetensors"), "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    recipe = json.loads(metadata["train"])
    assert (recipe.pop("region_share"), recipe.pop("region_crop")) == (0.0, [96, 48, 48])
    save_file(tensors, tmp_path / "tiny.state.safetensors", metadata | {"train": json.dumps(recipe)})
    model, train_config = load_config(data / "tiny.toml")
    Training(model, train_config, torch.device("cpu")).restore(tmp_path / "tiny.state.safetensors")
    otherwise = Training(model, replace(train_config, region_share=0.5), torch.device("cpu"))
    with pytest.raises(ModelError, match=r"\(region_share 0.0 then, 0.5 now\)"):
        otherwise.restore(tmp_path / "tiny.state.safetensors")


def test_a_run_may_begin_with_a_checkpoint(data: Path, trained: Path, tmp_path: Path) -> None:
    before, _ = load_checkpoint(trained)
    begun = Training(
        replace(load_config(data / "tiny.toml")[0], patients=(1, 3, 0)), TrainConfig(), torch.device("cpu")
    )
    begun.begin_with(trained)
    for own in (begun.network, begun.average):
        assert all(torch.equal(own.state_dict()[name], tensor) for name, tensor in before.state_dict().items())
    assert begun.model.patients == (2, 3, 1)  # trained on (2, 2, 1)

    output = tmp_path / "more.safetensors"
    result = train(data, output, "--from", str(trained), "--steps", "1")
    assert result.exit_code == 0, result.output
    best_before = max(row["mean"] for row in rows_of(trained.with_suffix(".csv")))
    assert f"step 0: mean {best_before:.3f}" in result.output
    resumed = train(data, output, "--resume", "--steps", "2")
    assert resumed.exit_code == 0, resumed.output
    assert [row["step"] for row in rows_of(output.with_suffix(".csv"))] == [1, 2]


def test_a_run_that_only_gets_worse_keeps_what_it_began_with(data: Path, trained: Path, tmp_path: Path) -> None:
    (data / "worse.toml").write_text(CONFIG.replace("5e-3", "100.0").replace("warmup_steps = 2", "warmup_steps = 0"))
    output = tmp_path / "worse.safetensors"
    options = ["--data", data, "--config", data / "worse.toml", "--output", output, "--from", trained, "--steps", 3]
    assert CliRunner().invoke(main, [str(option) for option in options]).exit_code == 0
    expected, found = (load_checkpoint(path)[0].state_dict() for path in (trained, output))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_beginning_with_another_model_is_refused(data: Path, tmp_path: Path) -> None:
    complaint = refusal(train(data, tmp_path / "t.safetensors", "--from", "openkbp7"))
    assert "openkbp7 was trained for BrainStem, SpinalCord" in complaint
    assert "expected the [model] of tiny" in complaint


def test_beginning_with_a_pickle_is_refused(data: Path, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "weights.pth")
    options = ("--from", str(tmp_path / "weights.pth"))
    assert "a pickled .pt or .pth is never read" in refusal(train(data, tmp_path / "t.safetensors", *options))


def test_a_run_either_resumes_or_begins(data: Path, trained: Path) -> None:
    for other in (("--from", str(trained)), ("--overwrite",)):
        result = train(data, trained, "--resume", *other)
        assert result.exit_code == 2
        assert "give one" in result.output


@pytest.mark.parametrize(
    ("file", "array", "complaint"),
    [
        ("img.nrrd", np.full(SHAPE, np.nan, np.float32), "bad: .*img.nrrd: expected finite Hounsfield units"),
        ("structures/Chiasm.nrrd", np.ones((8, 16, 25), np.uint8), "bad: .*expected the CT's shape"),
    ],
)
def test_a_case_that_cannot_be_right_is_one_line(
    tmp_path: Path, file: str, array: NDArray[np.generic], complaint: str
) -> None:
    (tmp_path / "tiny.toml").write_text(CONFIG)
    write_case(tmp_path / "train" / "bad", 0)
    nrrd.write(str(tmp_path / "train" / "bad" / file), array, HEADER, index_order="C")
    assert re.search(complaint, refusal(train(tmp_path, tmp_path / "t.safetensors")))


def test_an_empty_folder_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(CONFIG)
    assert "no case in" in refusal(train(tmp_path, tmp_path / "t.safetensors"))


def test_a_missing_validation_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(CONFIG)
    write_case(tmp_path / "train" / "a", 0)
    assert "validation" in refusal(train(tmp_path, tmp_path / "t.safetensors"))


def test_a_case_without_any_structure_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(CONFIG)
    write_case(tmp_path / "train" / "bare", 0, ())
    assert "bare: none of Chiasm" in refusal(train(tmp_path, tmp_path / "t.safetensors"))


def test_a_bad_case_is_named_and_skipped_or_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(CONFIG)
    for shift, name in enumerate(("train/a", "train/bad", "validation/c")):
        write_case(tmp_path / name, shift)
    (tmp_path / "train" / "bad" / "img.nrrd").write_bytes(b"broken")
    output = tmp_path / "out" / "tiny.safetensors"
    result = train(tmp_path, output, "--steps", "1")
    assert result.exit_code == 0, result.output
    assert "train: 1 cases (Chiasm 1, OpticNerve_L 1, OpticNerve_R 1)" in result.stdout
    assert "  skipped bad: " in result.stdout
    assert "bad" in output.with_suffix(".cases.csv").read_text()
    assert "1 of 2 cases" in refusal(train(tmp_path, output, "--strict", "--overwrite"))


def test_an_unknown_configuration_is_refused(data: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--data", str(data), "--config", "oar99", "--output", str(tmp_path / "t")])
    assert "no configuration oar99" in refusal(result)


def test_an_impossible_output_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be a folder" in refusal(train(data, tmp_path / "file" / "t.safetensors"))
    for name in ("t", "t.csv", "t.1"):  # .csv is the log's, and of t.1 and t.2 all but the weights would be one
        assert f"{name}: expected a name that ends in .safetensors" in refusal(train(data, tmp_path / name))
    assert "File name too long" in refusal(train(data, tmp_path / f"{'t' * 240}.safetensors"))
    (tmp_path / "folder.safetensors").mkdir()
    assert "is a folder" in refusal(train(data, tmp_path / "folder.safetensors", "--overwrite"))


def test_no_data_is_a_wrong_usage() -> None:
    assert CliRunner().invoke(main, []).exit_code == 2
