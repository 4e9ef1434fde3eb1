"""One visible training loop, and its command: cases -> checkpoint. First step of the straight path.

Where the recipe of Zhu et al. lies: engine/training.py takes one volume a step, whole where `whole_share` is 1, through
the two stages (section 3.1); engine/augmentation.py the augmentation (3.1). configs/oar9.toml sets all of it.
"""

import csv
import dataclasses
import io
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from anatomynet.engine.augmentation import Augmentation, Sample
from anatomynet.engine.checkpoint import save_checkpoint
from anatomynet.engine.command import reports_errors
from anatomynet.engine.config import SHIPPED_NAME, ModelConfig, TrainConfig, load_config
from anatomynet.engine.curves import write_curves
from anatomynet.engine.data import Case, cut_to_body, cut_to_head_and_neck
from anatomynet.engine.errors import DataError, ModelError, OutputError
from anatomynet.engine.events import event_log, forget_events
from anatomynet.engine.geometry import Index, Point, VolumeGeometry
from anatomynet.engine.machine import available_cores
from anatomynet.engine.metrics import dice
from anatomynet.engine.output import write_whole
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.region import RegionFinder
from anatomynet.engine.region_runtime import EmbeddedRegionFinder
from anatomynet.engine.runtime import TorchRuntime
from anatomynet.engine.segment import draw_reduced
from anatomynet.engine.stops import STOPS
from anatomynet.engine.survey import Survey, summary_lines, survey_archive, write_survey
from anatomynet.engine.training import Training

# Threads that make samples. One is enough for two cores, where a sample takes 8 ms, a phantom 0.23 s and a step half a
# second. A GPU draws its samples itself, between its steps; the threads make phantoms.
LOADERS = max(1, min(4, available_cores() // 4))
AHEAD = LOADERS + 2  # samples kept ready
# A phantom is a planning CT: so many slices, and so many voxels in plane before they are averaged.
PHANTOM_SLICES, PHANTOM_SIDE = 112, 512
PHANTOM_MM = 280.0  # from the vertex down: all organs but cord and oesophagus end above
SHIPPED_STRIDE = 4
PHANTOMS = 64  # different ones in a run; they take 0.1 GB at stride 4, 2 GB at native resolution
SUFFIX = ".safetensors"  # of the checkpoint
SAVED_EVERY_S = 300.0  # the state: an epoch may take a quarter of an hour
NOTED_STEPS = 50  # between two looks at the loss, for which a GPU must be waited


def samples(
    cases: list[Case], model: ModelConfig, train: TrainConfig, *, first: int, device: torch.device | str = "cpu"
) -> Iterator[Sample]:
    """The samples of steps `first` to the last, on the device; each hangs on the seed and its step alone.

    Threads make them ahead; of a GPU's they choose the cases, and it draws from them when its turn comes.
    """
    augmentation = Augmentation(model, train, device)
    ahead = augmentation.device.type == "cpu"
    phantom = lru_cache(PHANTOMS)(partial(_phantom_like_one_of, cases, model, train.seed))

    def make(step: int) -> Callable[[], Sample]:
        random = np.random.default_rng((train.seed, step))
        around = None
        if random.random() < train.phantom_share:
            case = phantom(step % PHANTOMS)
        else:
            # A pass over the cases is a shuffle of them.
            order = np.random.default_rng((train.seed, step // len(cases), 1)).permutation(len(cases))
            case = cases[order[step % len(cases)]]
            if train.balanced_share and random.random() < train.balanced_share:
                case, around = chosen_by_structure(cases, train, random)
        if not ahead:
            return partial(augmentation.draw, case, around, random=random)
        sample = augmentation.draw(case, around, random=random)
        return lambda: sample

    with ThreadPoolExecutor(LOADERS) as pool:
        ready = [pool.submit(make, step) for step in range(first, min(first + AHEAD, train.steps))]
        for step in range(first, train.steps):
            draw = ready.pop(0).result()
            if step + AHEAD < train.steps:
                ready.append(pool.submit(make, step + AHEAD))
            yield draw()


def _phantom_like_one_of(cases: list[Case], model: ModelConfig, seed: int, number: int) -> Case:
    like = cases[int(np.random.default_rng((seed, number, 2)).integers(len(cases)))]
    return phantom_case(model, spacing=like.volume.geometry.spacing, seed=number)


def chosen_by_structure(cases: list[Case], train: TrainConfig, random: np.random.Generator) -> tuple[Case, int]:
    """A label, as likely as its class weights, and a case in which it is annotated: what few have is not forgotten.

    Raises:
        DataError: no case has a structure of which a class weight says anything.
    """
    have = np.array([case.annotated for case in cases])
    weights = np.array(train.class_weights[1:] or (1.0,) * have.shape[1]) * have.any(axis=0)
    if not weights.any():
        raise DataError("no case has a structure whose class weight is above 0: mend class_weights, or add cases")
    label = 1 + int(random.choice(have.shape[1], p=weights / weights.sum()))
    return cases[int(random.choice(np.flatnonzero(have[:, label - 1])))], label


def phantom_case(model: ModelConfig, *, spacing: Point, seed: int) -> Case:
    """A synthetic case at a spacing (x, y, z) mm, cut to the body, every structure annotated."""
    geometry = VolumeGeometry(_phantom_shape(model, spacing), spacing)
    volume, truth = make_phantom(geometry, seed=seed, structures=model.structures)
    annotated = (True,) * len(model.structures)
    return cut_to_body(Case(f"phantom_{seed}", volume, truth.labels, annotated, synthetic=True))


def _phantom_shape(model: ModelConfig, spacing: Point) -> Index:
    side, slices = PHANTOM_SIDE // model.in_plane_stride, PHANTOM_SLICES
    # The shipped weights learnt from phantoms of so many slices, however thin: they stay what they were.
    if model.in_plane_stride != SHIPPED_STRIDE:
        slices = max(slices, math.ceil(PHANTOM_MM / spacing[2]))
    return slices, side, side


def cases_to_learn_from(survey: Survey) -> list[Case]:
    """The cases of a survey, cut to head and neck and to the body; it keeps none: whole, they would fill memory too."""
    whole, survey.cases[:] = survey.cases[::-1], ()
    return [cut_to_body(cut_to_head_and_neck(whole.pop())) for _ in range(len(whole))]


def patient_counts(cases: Sequence[Case]) -> tuple[int, ...]:
    """For each structure, how many patients have its contours; phantoms are none."""
    counts = np.sum([case.annotated for case in cases if not case.synthetic], axis=0, dtype=int)
    return tuple(counts.tolist()) if counts.shape else (0,) * len(cases[0].annotated)


def validate(
    network: nn.Module,
    model: ModelConfig,
    cases: list[Case],
    device: torch.device | str,
    *,
    region_finder: RegionFinder | None = None,
) -> dict[str, list[float]]:
    """DSC of each structure over the cases that have it, drawn by the same `segment` that serves: the box that the
    region finder cuts, where there is one that knows the model's structures, else the whole body."""
    runtime = TorchRuntime(network, model, device, region_finder=region_finder)

    def measure(case: Case) -> dict[str, float]:
        drawn = draw_reduced(case.volume, runtime).labels
        labels = {name: i for i, name in enumerate(model.structures, start=1) if case.annotated[i - 1]}
        return {name: dice(drawn == label, case.labels == label) for name, label in labels.items()}

    # Beside a GPU, most of the time goes into what the processor does before and after the network.
    side_by_side = available_cores() // 2 if torch.device(device).type == "cuda" else 1
    with ThreadPoolExecutor(max(1, min(8, side_by_side))) as pool:
        measured = list(pool.map(measure, cases))
    return {name: [scores[name] for scores in measured if name in scores] for name in model.structures}


def finder_for(train: TrainConfig) -> RegionFinder | None:
    """The region finder for weights that learn crops as its boxes: they are validated in what they will be shown.

    Raises:
        ModelError: it cannot be opened.
    """
    return EmbeddedRegionFinder() if train.region_share else None


def fit(
    training: Training, cases: list[Case], held_out: list[Case], output: Path, *, region_finder: RegionFinder | None
) -> None:
    """Trains to the last step; saves state, logs and best checkpoint beside `output` after every epoch, which it
    validates with what `finder_for` opened.

    The state is saved before the first step and every few minutes too: a run that is killed can be resumed from there.
    Ctrl-C, SIGTERM and SIGHUP save it after the step under way, then do what they do elsewhere; an ignored SIGHUP stays
    so.

    Raises:
        ModelError: the loss is no number any more; what was saved before is kept.
        OutputError: something could not be written.
    """
    train = training.train
    losses = training.losses
    log = output.with_suffix(".csv")
    if not training.step:
        _save_state(training, output)
    if (kept := _kept_log(log, until=training.step)) is not None:
        write_whole(log, kept, overwrite=True)
    with (
        _Interruptible() as interruption,
        event_log(output, first=training.step) as write_events,
        tqdm(total=train.steps, initial=training.step, unit="step") as bar,
    ):
        saved = time.monotonic()
        for sample in samples(cases, training.model, train, first=training.step, device=training.device):
            losses.append(training.learn(sample))
            if training.step % NOTED_STEPS == 0:
                bar.set_postfix(loss=f"{_finite_mean(losses[-NOTED_STEPS:], training.step):.3f}", refresh=False)
            bar.update()
            ended = training.step % train.steps_per_epoch == 0 or training.step == train.steps
            if ended:
                loss = _finite_mean(losses, training.step)
                row = keep_best(training, held_out, output, loss=loss, region_finder=region_finder)
                bar.write(_told(row))
                _append_row(log, row)
                write_curves(log)
                write_events(row)
                losses.clear()
            asked = interruption.asked  # from here on it is for the next step
            if ended or asked or time.monotonic() >= saved + SAVED_EVERY_S:
                _save_state(training, output)
                saved = time.monotonic()
            if asked:
                interruption.end(asked)


def _save_state(training: Training, output: Path) -> None:
    """Not one that has diverged: what was saved before is of more use."""
    if training.losses:
        _finite_mean(training.losses, training.step)
    training.save(_state_of(output))


def _finite_mean(losses: list[Tensor], step: int) -> float:
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean):
        raise ModelError(
            f"the loss is {mean} after {step} steps: training has diverged; begin anew with a lower learning_rate. "
            "What was saved before is kept"
        )
    return mean


def keep_best(
    training: Training, held_out: list[Case], output: Path, *, loss: float, region_finder: RegionFinder | None
) -> dict[str, float]:
    """Validates the averaged weights, writes them if they are the best so far; the log's row."""
    scores = validate(training.average, training.model, held_out, training.device, region_finder=region_finder)
    means = {name: float(np.mean(values)) if values else math.nan for name, values in scores.items()}
    mean = float(np.nanmean(list(means.values())))
    if mean > training.best:
        training.best = mean
        save_checkpoint(output, training.average, training.model)
    return {"step": training.step, "loss": loss, "mean": mean, **means}


def _told(row: dict[str, float]) -> str:
    scores = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name not in ("step", "loss"))
    return f"step {row['step']:.0f}: {scores}"


def _state_of(output: Path) -> Path:
    """Where a run's state lies, from which it is resumed."""
    return output.with_suffix(".state.safetensors")


class _Interruptible:
    """Turns Ctrl-C and stops into a wish, so that a step is never cut in two; a second Ctrl-C ends at once."""

    asked = 0  # the first signal's number

    def __enter__(self) -> "_Interruptible":
        heard = [signal.SIGINT, *(stop for stop in STOPS if signal.getsignal(stop) != signal.SIG_IGN)]  # as by nohup
        self._before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._before):
            self._give_back(number)

    def end(self, asked: int) -> NoReturn:
        """Does what the signal did before it was a wish."""
        self.__exit__()
        signal.raise_signal(asked)
        raise KeyboardInterrupt  # one that is ignored elsewhere, as Ctrl-C is in the background

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.asked = self.asked or number
        self._give_back(signal.SIGINT)  # of stops `timeout` and terminals send two, and nobody meant the second

    def _give_back(self, number: signal.Signals) -> None:
        if number in self._before:
            signal.signal(number, self._before.pop(number))


def _append_row(path: Path, row: dict[str, float]) -> None:
    """Adds a row, and a header before the first: whole, or the file stays as it was."""
    before = path.read_bytes() if path.is_file() else b""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, row)
    if not before:
        writer.writeheader()
    writer.writerow({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()})
    write_whole(path, before + text.getvalue().encode(), overwrite=True)


def files_there(output: Path, *beside: Path) -> list[Path]:
    """Makes a checkpoint's folder; which of its file and those beside it are there.

    Raises:
        OutputError: a name that is no checkpoint's, or a place that could not be written.
    """
    if output.suffix != SUFFIX:
        raise OutputError(f"{output}: expected a name that ends in {SUFFIX}: all else of a run is named after it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output.parent} cannot be a folder for the checkpoint: {error.strerror}") from error
    try:
        there = [path for path in (output, *beside) if path.exists()]
    except OSError as error:  # a name that is too long
        raise OutputError(f"{output} could not be written: {error.strerror}") from error
    if output.is_dir():
        raise OutputError(f"{output} is a folder: expected a file's name")
    return there


def _prepare_output(output: Path, *, overwrite: bool) -> None:
    """Makes the checkpoint's folder; refuses what could not be written, and to lose another run unasked."""
    there = files_there(output, _state_of(output))
    if there and not overwrite:
        helps = "of another run: give --resume to go on with it,"
        if _state_of(output) not in there:
            helps = "without a state to go on from: give"
        raise OutputError(f"{there[0]} is there, {helps} --overwrite to lose it, or another --output")


def _forget_run(output: Path, *, weights: bool) -> None:
    """Removes state and logs of the run that was at `output`, and its weights if told so: it is another one."""
    logs = [output.with_suffix(suffix) for suffix in (".csv", ".png")]
    for path in (_state_of(output), *logs, *([output] if weights else [])):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{path}, of another run, could not be removed: {error.strerror}") from error
    forget_events(output)


def _kept_log(path: Path, *, until: int) -> bytes | None:
    """Of a log, what was written before the state that a run goes on from: the rest comes again. None without one.

    Raises:
        OutputError: the file is no log.
    """
    if not path.is_file() or not path.stat().st_size:
        return None
    try:
        header, *rows = path.read_bytes().decode().splitlines(keepends=True)  # csv's own line ends
        kept = [row for row in rows if int(row.split(",")[0]) <= until]
    except ValueError as error:
        raise OutputError(
            f"{path} is not the log that anatomynet-train wrote: move it away, and another begins"
        ) from error
    return "".join((header, *kept)).encode()


def _resume(training: Training, output: Path) -> None:
    """Restores what is saved beside `output`, and refuses what could not go on, before a case is read."""
    state = _state_of(output)
    training.restore(state)
    if training.validated and not output.is_file():  # what comes may be worse, and would not be written
        raise OutputError(f"{output}, the best of this run so far, is not there: put it back, or begin anew")
    _kept_log(output.with_suffix(".csv"), until=training.step)
    if not training.digests:
        click.echo(
            f"{state} does not tell which cases it was trained on, being older: be sure that they are these", err=True
        )


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder with train/ and validation/.")
@click.option("--config", default="openkbp7", show_default=True, help="A shipped configuration, or a TOML file.")
@click.option("--output", type=click.Path(path_type=Path), help="Checkpoint to write; runs/NAME.safetensors.")
@click.option("--resume", is_flag=True, help="Go on from the state beside --output, with the same cases.")
@click.option("--overwrite", is_flag=True, help="Lose the run that is at --output, if there is one.")
@click.option(
    "--from",
    "begin_with",
    metavar="CHECKPOINT",
    help="Begin with the weights of a .safetensors file, or with the shipped ones: openkbp7.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Instead of the configuration's.")
@click.option("--strict", is_flag=True, help="A case that cannot be used is an error; without, it is skipped.")
@click.option("--aliases", type=click.Path(path_type=Path), help="Your names: a TOML table, structure = [names].")
@reports_errors
def main(
    data: Path,
    config: str,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    begin_with: str | None,
    steps: int | None,
    strict: bool,
    aliases: Path | None,
) -> None:
    """Train AnatomyNet on a folder of annotated CTs.

    Beside the checkpoint lie the log, its curves, the same for TensorBoard, the state to resume from, and .cases.csv:
    what became of every case. With --from, the checkpoint is never worse on validation than the one begun with.
    """
    if resume and overwrite:
        raise click.UsageError("--resume goes on with the run that --overwrite would lose: give one")
    if resume and begin_with:
        raise click.UsageError("--resume goes on from its own state, --from begins anew: give one")
    model, train = load_config(config)
    if steps:
        train = dataclasses.replace(train, steps=steps)
    output = output or Path("runs") / f"{model.name}.safetensors"
    _prepare_output(output, overwrite=resume or overwrite)  # before an hour of training, not after
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training = Training(model, train, device)
    if begin_with:
        training.begin_with(None if begin_with == SHIPPED_NAME else Path(begin_with))
    if resume:
        _resume(training, output)
    finder = finder_for(train)
    surveys = survey_archive(data, model, alias_file=aliases, strict=strict)
    for survey in surveys:
        click.echo("\n".join(summary_lines(survey, model)))
    training.take_cases({survey.folder: survey.digests for survey in surveys}, archive=data)
    write_survey(output.with_suffix(".cases.csv"), surveys)  # only now that nothing is refused any more
    if not resume:
        # Weights to begin with are written there at once, and may be those that are there.
        _forget_run(output, weights=not begin_with)
    cases, held_out = cases_to_learn_from(surveys[0]), surveys[1].cases
    training.count_patients(patient_counts(cases))
    if begin_with:
        click.echo(_told(keep_best(training, held_out, output, loss=math.nan, region_finder=finder)))
    fit(training, cases, held_out, output, region_finder=finder)
    click.echo(f"{output}: best mean validation DSC {training.best:.3f}, {training.step} steps on {device.type}")


if __name__ == "__main__":
    main()
