"""A run that is killed, at any moment, and resumed: to the last byte what it would have been."""

import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.killed_training import status_of_killed
from tests.test_train import CONFIG, STEPS, STEPS_PER_EPOCH, WAIT_S, refusal, train, write_archive

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = "tiny.state.safetensors"
EVENTS = "tiny.tensorboard"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a recipe of three epochs of three steps: all that matters is that the second is better than the first."""
    folder = write_archive(tmp_path_factory.mktemp("data"))
    steps = f"steps = {STEPS}\nsteps_per_epoch = {STEPS_PER_EPOCH}\n"
    assert steps in CONFIG
    (folder / "tiny.toml").write_text(CONFIG.replace(steps, "steps = 9\nsteps_per_epoch = 3\nseed = 3\n"))
    return folder


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = train(data, folder / "tiny.safetensors")
    assert result.exit_code == 0, result.output
    return folder


def killed(data: Path, output: Path, moment: str, times: int, *options: str) -> None:
    """Trains in a process that kills itself at that moment."""
    options = ("--data", str(data), "--config", str(data / "tiny.toml"), "--output", str(output), *options)
    said = data / "said.txt"
    status = status_of_killed(moment, times, options, said=said, wait_s=WAIT_S)
    assert status == -signal.SIGKILL, said.read_text()


def state_of(folder: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(folder / STATE, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict


def points_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(folder / EVENTS)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_alike(found: Path, expected: Path) -> None:
    """Checkpoint, log, curves and cases byte by byte; the state, whose header has no order, by what it holds."""
    files = {path.name for path in expected.iterdir()}
    assert {path.name for path in found.iterdir()} == files
    for name in files - {STATE, EVENTS}:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    (metadata, tensors), (expected_metadata, expected_tensors) = state_of(found), state_of(expected)
    assert metadata == expected_metadata
    assert tensors.keys() == expected_tensors.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, expected_tensors[name])] == []
    if find_spec("tensorboard") and EVENTS in files:
        assert points_of(found) == points_of(expected)


@pytest.mark.parametrize(
    ("moment", "times", "step"),
    [
        ("state written", 1, 0),
        ("step done", 2, 0),
        ("row and curves written", 1, 0),
        ("state written", 2, 3),
        ("step done", 8, 6),  # in the middle of the third epoch
        ("step done, each one saved", 8, 7),
        ("best written", 2, 3),
        ("row and curves written", 2, 3),
        ("all but the state written", 4, 6),
    ],
)
def test_killed_and_resumed_it_is_the_run_that_nothing_happened_to(
    data: Path, undisturbed: Path, tmp_path: Path, moment: str, times: int, step: int
) -> None:
    output = tmp_path / "tiny.safetensors"
    killed(data, output, moment, times)
    assert int(state_of(tmp_path)[0]["step"]) == step, "not the moment that was meant"
    resumed = train(data, output, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert_alike(tmp_path, undisturbed)


def test_killed_again_after_it_was_resumed(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "tiny.safetensors"
    killed(data, output, "step done", 5)
    killed(data, output, "all but the state written", 1, "--resume")
    assert train(data, output, "--resume").exit_code == 0
    assert_alike(tmp_path, undisturbed)


@pytest.fixture(scope="module")
def begun_with_weights(data: Path, undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from weights that were there, that nothing happened to."""
    folder = tmp_path_factory.mktemp("begun_with_weights")
    result = train(data, folder / "tiny.safetensors", "--from", str(undisturbed / "tiny.safetensors"))
    assert result.exit_code == 0, result.output
    return folder


def test_killed_in_its_first_epoch_a_run_from_weights_goes_on(
    data: Path, undisturbed: Path, begun_with_weights: Path, tmp_path: Path
) -> None:
    """With what step 0 gave as its best so far, though no epoch of it is done."""
    output = tmp_path / "tiny.safetensors"
    killed(data, output, "step done", 2, "--from", str(undisturbed / output.name))
    assert output.is_file()
    assert "give --resume to go on with it" in refusal(train(data, output))
    resumed = train(data, output, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert_alike(tmp_path, begun_with_weights)


def test_killed_before_its_first_state_it_begins_again(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """And takes no state of the run that was there before."""
    output = tmp_path / "tiny.safetensors"
    shutil.copy(undisturbed / STATE, tmp_path)
    killed(data, output, "all but the state written", 1, "--overwrite")
    assert f"nothing to resume: no state {tmp_path / STATE}" in refusal(train(data, output, "--resume"))
    assert train(data, output).exit_code == 0
    assert_alike(tmp_path, undisturbed)


def test_killed_between_its_first_checkpoint_and_its_first_state_it_says_what_helps(
    data: Path, undisturbed: Path, begun_with_weights: Path, tmp_path: Path
) -> None:
    """Not to resume, where there is nothing to resume from."""
    output, begin_with = tmp_path / "tiny.safetensors", ("--from", str(undisturbed / "tiny.safetensors"))
    killed(data, output, "best written", 1, *begin_with)
    complaint = refusal(train(data, output, *begin_with))
    assert "without a state to go on from: give --overwrite to lose it, or another --output" in complaint
    assert train(data, output, "--overwrite", *begin_with).exit_code == 0
    assert_alike(tmp_path, begun_with_weights)
