"""One visible training loop, and its command: cases -> checkpoint. First step of the straight path.

Where the recipe of Zhu et al. lies: `learn` takes one volume a step (section 3.1), whole where `whole_share` is 1;
`_new_optimiser` and `rate_at` are the two stages (3.1); engine/losses.py is the hybrid loss and its masks (2.3, 2.4);
engine/data.py the augmentation (3.1); engine/network.py the network (2.2). configs/oar9.toml sets all of it.
"""

import csv
import dataclasses
import itertools
import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import click
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from anatomynet.engine.checkpoint import load_checkpoint, save_checkpoint
from anatomynet.engine.command import reports_errors
from anatomynet.engine.config import SHIPPED_NAME, ModelConfig, TrainConfig, load_config, model_config_from_json
from anatomynet.engine.curves import write_curves
from anatomynet.engine.data import Augmentation, Case, Sample, cut_to_body, cut_to_head_and_neck
from anatomynet.engine.errors import ModelError, OutputError
from anatomynet.engine.events import event_log, forget_events
from anatomynet.engine.geometry import Point, VolumeGeometry
from anatomynet.engine.losses import hybrid_loss
from anatomynet.engine.metrics import dice
from anatomynet.engine.network import AnatomyNet
from anatomynet.engine.output import write_whole
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.resolution import draw_reduced
from anatomynet.engine.runtime import TorchRuntime
from anatomynet.engine.survey import summary_lines, survey_cases, write_survey

LOADERS = 1  # threads that make samples: they cost a tenth of a step
AHEAD = 3  # samples kept ready
LARGEST_GRADIENT = 12.0
PHANTOM_SHAPE = (112, 128, 128)  # (z, y, x), as a planning CT reduced 4 x 4 in plane
MOMENTUM = 0.9  # of the paper's second stage (section 3.1)
MAY_CHANGE = ("steps", "steps_per_epoch")  # when a run is resumed
FINAL_RATE = 0.01  # share of the learning rate that is left at the end


class Training:
    """Everything that a training run changes, and that a resumed run must find again.

    Args:
        model: what is learnt.
        train: how.
        device: where.
        new_network: makes the network of so many classes: another one may learn by the same recipe, to be compared.
    """

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        device: torch.device,
        *,
        new_network: Callable[[int], nn.Module] = AnatomyNet,
    ) -> None:
        torch.manual_seed(train.seed)
        self.model = model
        self.train = train
        self.device = device
        self.network = _channels_last(new_network(model.classes).to(device))
        self.average = _channels_last(new_network(model.classes).to(device)).eval()
        self.average.load_state_dict(self.network.state_dict())
        self.step = 0
        self.optimiser = self._new_optimiser()
        self.best = -1.0  # below the worst DSC: the first validation always writes a checkpoint

    def begin_with(self, path: Path | None) -> None:
        """Takes the weights of a checkpoint instead of random ones; None is the shipped one.

        A structure then counts as taught by as many patients as here or there, whichever are more: how many are the
        same is not known.

        Raises:
            ModelError: no checkpoint there, or one that draws other structures, at another stride, window or spacing.
        """
        network, model = load_checkpoint(path)
        alike = dataclasses.replace(self.model, name=model.name, checkpoint_sha256=model.checkpoint_sha256)
        if not _same_but_patients(model, alike):
            raise ModelError(
                f"{path or model.name} was trained for {', '.join(model.structures)} at in_plane_stride "
                f"{model.in_plane_stride}: expected the [model] of {self.model.name}, its window and spacing included"
            )
        for own in (self.network, self.average):
            own.load_state_dict(network.state_dict())
        self._count_patients_of(model)

    def _count_patients_of(self, model: ModelConfig) -> None:
        pairs = itertools.zip_longest(self.model.patients, model.patients, fillvalue=0)
        self.model = dataclasses.replace(self.model, patients=tuple(max(pair) for pair in pairs))

    def learn(self, sample: Sample) -> float:
        """One optimiser step on one volume; returns the loss."""
        if self.step == second_stage_start(self.train):
            self.optimiser = self._new_optimiser()
        for group in self.optimiser.param_groups:
            group["lr"] = rate_at(self.step, self.train)
        self._set_mode()
        image = sample.image.to(self.device, memory_format=torch.channels_last_3d)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.train.precision == "bfloat16"):
            logits = self.network(image)
        loss = hybrid_loss(
            logits,
            sample.target.to(self.device),
            sample.annotated,
            class_weights=self.train.class_weights,
            focal_weight=self.train.focal_weight,
            focal_gamma=self.train.focal_gamma,
            missing=self.train.missing,
        )
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
        self.optimiser.step()
        self.step += 1
        self._follow()
        return float(loss.detach())

    def _new_optimiser(self) -> torch.optim.Optimizer:
        """That of the stage which the step lies in, without a memory."""
        weights, train = self.network.parameters(), self.train
        if train.optimiser == "adamw":
            return torch.optim.AdamW(weights, lr=train.learning_rate, weight_decay=train.weight_decay)
        if self.step < second_stage_start(train):
            return torch.optim.RMSprop(weights, lr=train.learning_rate, weight_decay=train.weight_decay)
        return torch.optim.SGD(weights, lr=train.second_rate, momentum=MOMENTUM, weight_decay=train.weight_decay)

    def _set_mode(self) -> None:
        """Training mode; late in the run the normalisation keeps the averaged statistics, those that will serve.

        With one volume a batch, a layer that normalises by the batch sees each volume by its own statistics, which the
        served network does not have. What freezing gains has not been measured by itself.
        """
        self.network.train()
        frozen_from = round(self.train.steps * (1 - self.train.frozen_norm_share))
        if self.step == frozen_from:
            self.network.load_state_dict(self.average.state_dict())
        if self.step >= frozen_from:
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm3d):
                    module.eval()

    def save(self, path: Path) -> None:
        """Writes the state, whole or not at all; `restore` reads it.

        Raises:
            OutputError: it could not be written.
        """
        tensors: dict[str, Tensor] = {}
        for prefix, network in (("network", self.network), ("average", self.average)):
            tensors |= {f"{prefix}.{k}": v.detach().contiguous().cpu() for k, v in network.state_dict().items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{k}": v.contiguous().cpu() for k, v in moments.items()}
        train = json.dumps(dataclasses.asdict(self.train), sort_keys=True)
        metadata = {"model": self.model.to_json(), "train": train, "step": str(self.step), "best": repr(self.best)}
        write_whole(path, save(tensors, metadata=metadata), overwrite=True)

    def restore(self, path: Path) -> None:
        """Goes on from what `save` wrote; the number of steps and their epochs may be others.

        Raises:
            ModelError: no state there, or that of another configuration.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (OSError, SafetensorError) as error:
            raise ModelError(f"nothing to resume: {path} is not a state that anatomynet-train saved") from error
        # How many patients taught what is no configuration, and states older than that count lack it.
        model = model_config_from_json(metadata["model"]) if "model" in metadata else None
        if model is None or not _same_but_patients(model, self.model):
            raise ModelError(f"{path} was trained for another configuration than {self.model.name}: start a new output")
        _check_recipe(metadata.get("train"), self.train, path)
        for prefix, network in (("network", self.network), ("average", self.average)):
            network.load_state_dict(_with_prefix(tensors, prefix))
        self._count_patients_of(model)  # the checkpoint that the run began with may have had others
        self.step, self.best = int(metadata["step"]), float(metadata["best"])
        self.optimiser = self._new_optimiser()
        if self.step == second_stage_start(self.train):
            return  # what was saved is the first stage's memory, of no use to the second
        saved = self.optimiser.state_dict()
        saved["state"] = {
            i: _with_prefix(tensors, f"optimiser.{i}") for i in range(len(list(self.network.parameters())))
        }
        self.optimiser.load_state_dict(saved)

    def _follow(self) -> None:
        """Moves the averaged weights; early on they follow faster, so that they forget where they began."""
        keep = min(self.train.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, now in zip(self.average.state_dict().values(), self.network.state_dict().values(), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(now, 1 - keep)
                else:
                    mean.copy_(now)


def _same_but_patients(one: ModelConfig, other: ModelConfig) -> bool:
    return dataclasses.replace(one, patients=()) == dataclasses.replace(other, patients=())


def _check_recipe(saved: str | None, train: TrainConfig, path: Path) -> None:
    """Refuses a recipe with which no run from the start could have come here; older states do not tell theirs."""
    before = json.loads(saved) if saved else {}
    now = json.loads(json.dumps(dataclasses.asdict(train)))
    changed = [name for name in before if name not in MAY_CHANGE and now.get(name) != before[name]]
    if changed:
        told = ", ".join(f"{name} {before[name]} then, {now.get(name)} now" for name in changed)
        raise ModelError(f"{path} was trained otherwise ({told}): nobody could repeat such a run; start a new output")


def second_stage_start(train: TrainConfig) -> int:
    """The step from which SGD takes over (section 3.1); one past the last where there is one stage."""
    return train.steps + 1 if train.optimiser == "adamw" else round(train.steps * (1 - train.second_share))


def rate_at(step: int, train: TrainConfig) -> float:
    """Learning rate at a step."""
    if train.optimiser == "adamw":
        return train.learning_rate * rate_share(step, train)
    return train.learning_rate if step < second_stage_start(train) else train.second_rate


def rate_share(step: int, train: TrainConfig) -> float:
    """Share of AdamW's learning rate at a step: a linear warm-up, then half a cosine."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def samples(cases: list[Case], model: ModelConfig, train: TrainConfig, *, first: int) -> Iterator[Sample]:
    """The samples of steps `first` to the last, made ahead in a thread; each hangs on the seed and its step alone."""
    augmentation = Augmentation(model, train)

    def make(step: int) -> Sample:
        random = np.random.default_rng((train.seed, step))
        if random.random() < train.phantom_share:
            like = cases[int(random.integers(len(cases)))]
            case = phantom_case(model, spacing=like.volume.geometry.spacing, seed=step)
        else:
            # A pass over the cases is a shuffle of them.
            order = np.random.default_rng((train.seed, step // len(cases), 1)).permutation(len(cases))
            case = cases[order[step % len(cases)]]
            if train.balanced_share and random.random() < train.balanced_share:
                return augmentation.draw(*chosen_by_structure(cases, train, random), random=random)
        return augmentation.draw(case, random=random)

    with ThreadPoolExecutor(LOADERS) as pool:
        ready = [pool.submit(make, step) for step in range(first, min(first + AHEAD, train.steps))]
        for step in range(first, train.steps):
            sample = ready.pop(0).result()
            if step + AHEAD < train.steps:
                ready.append(pool.submit(make, step + AHEAD))
            yield sample


def chosen_by_structure(cases: list[Case], train: TrainConfig, random: np.random.Generator) -> tuple[Case, int]:
    """A label, as likely as its class weights, and a case in which it is annotated: what few have is not forgotten."""
    have = np.array([case.annotated for case in cases])
    weights = np.array(train.class_weights[1:] or (1.0,) * have.shape[1]) * have.any(axis=0)
    label = 1 + int(random.choice(have.shape[1], p=weights / weights.sum()))
    return cases[int(random.choice(np.flatnonzero(have[:, label - 1])))], label


def phantom_case(model: ModelConfig, *, spacing: Point, seed: int) -> Case:
    """A synthetic case at a spacing (x, y, z) mm, cut to the body, every structure annotated."""
    geometry = VolumeGeometry(PHANTOM_SHAPE, spacing)
    volume, truth = make_phantom(geometry, seed=seed, structures=model.structures)
    annotated = (True,) * len(model.structures)
    return cut_to_body(Case(f"phantom_{seed}", volume, truth.labels, annotated, synthetic=True))


def patient_counts(cases: Sequence[Case]) -> tuple[int, ...]:
    """For each structure, how many patients have its contours; phantoms are none."""
    counts = np.sum([case.annotated for case in cases if not case.synthetic], axis=0, dtype=int)
    return tuple(counts.tolist()) if counts.shape else (0,) * len(cases[0].annotated)


def validate(
    network: nn.Module, model: ModelConfig, cases: list[Case], device: torch.device | str
) -> dict[str, list[float]]:
    """DSC of each structure over the cases that have it, drawn by the same `segment` that serves."""
    runtime = TorchRuntime(network, model, device)
    scores: dict[str, list[float]] = {name: [] for name in model.structures}
    for case in cases:
        drawn = draw_reduced(case.volume, runtime).labels
        for label, name in enumerate(model.structures, start=1):
            if case.annotated[label - 1]:
                scores[name].append(dice(drawn == label, case.labels == label))
    return scores


def fit(training: Training, cases: list[Case], held_out: list[Case], output: Path) -> None:
    """Trains to the last step; saves state, logs and best checkpoint beside `output` after every epoch.

    Ctrl-C saves the state after the step under way, then raises KeyboardInterrupt.
    """
    train = training.train
    losses: list[float] = []
    with (
        _Interruptible() as interruption,
        event_log(output, first=training.step) as write_events,
        tqdm(total=train.steps, initial=training.step, unit="step") as bar,
    ):
        for sample in samples(cases, training.model, train, first=training.step):
            losses.append(training.learn(sample))
            bar.update()
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
            if training.step % train.steps_per_epoch == 0 or training.step == train.steps:
                row = keep_best(training, held_out, output, loss=float(np.mean(losses)))
                bar.write(_told(row))
                _append_row(output.with_suffix(".csv"), row)
                write_curves(output.with_suffix(".csv"))
                write_events(row)
                losses.clear()
                training.save(_state_of(output))
            if interruption.asked:
                training.save(_state_of(output))
                raise KeyboardInterrupt


def keep_best(training: Training, held_out: list[Case], output: Path, *, loss: float) -> dict[str, float]:
    """Validates the averaged weights, writes them if they are the best so far; the log's row."""
    scores = validate(training.average, training.model, held_out, training.device)
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
    """Turns the first Ctrl-C into a wish, so that a step is never cut in two; the second one interrupts."""

    asked = False

    def __enter__(self) -> "_Interruptible":
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)


def _append_row(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()})


def _forget_rows(path: Path, *, beyond: int) -> None:
    """Leaves out of a log what was written after the state that a run goes on from: it comes again."""
    if path.is_file():
        header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [row for row in rows if int(row.split(",")[0]) <= beyond]
        write_whole(path, "".join((header, *kept)).encode(), overwrite=True)


def _channels_last(network: nn.Module) -> nn.Module:
    """The layout in which 3-D convolutions are fastest."""
    # torch's stubs know memory_format only for 4-D tensors.
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload, no-any-return]


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder with train/ and validation/.")
@click.option("--config", default="openkbp7", show_default=True, help="A shipped configuration, or a TOML file.")
@click.option("--output", type=click.Path(path_type=Path), help="Checkpoint to write; runs/NAME.safetensors.")
@click.option("--resume", is_flag=True, help="Go on from the state beside --output.")
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
    begin_with: str | None,
    steps: int | None,
    strict: bool,
    aliases: Path | None,
) -> None:
    """Train AnatomyNet on a folder of annotated CTs.

    Beside the checkpoint lie the log, its curves, the same for TensorBoard, the state to resume from, and .cases.csv:
    what became of every case. With --from, the checkpoint is never worse on validation than the one begun with.
    """
    if resume and begin_with:
        raise click.UsageError("--resume goes on from its own state, --from begins anew: give one")
    model, train = load_config(config)
    if steps:
        train = dataclasses.replace(train, steps=steps)
    output = output or Path("runs") / f"{model.name}.safetensors"
    try:  # before an hour of training, not after
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output.parent} cannot be a folder for the checkpoint: {error.strerror}") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    surveys = [survey_cases(data / name, model, alias_file=aliases, strict=strict) for name in ("train", "validation")]
    write_survey(output.with_suffix(".cases.csv"), surveys)
    for survey in surveys:
        click.echo("\n".join(summary_lines(survey, model)))
    cases, held_out = [cut_to_body(cut_to_head_and_neck(case)) for case in surveys[0].cases], surveys[1].cases
    training = Training(dataclasses.replace(model, patients=patient_counts(cases)), train, device)
    if resume:
        training.restore(_state_of(output))
        _forget_rows(output.with_suffix(".csv"), beyond=training.step)
    else:
        output.with_suffix(".csv").unlink(missing_ok=True)  # another run's log
        forget_events(output)
    if begin_with:
        training.begin_with(None if begin_with == SHIPPED_NAME else Path(begin_with))
        click.echo(_told(keep_best(training, held_out, output, loss=math.nan)))
    fit(training, cases, held_out, output)
    click.echo(f"{output}: best mean validation DSC {training.best:.3f}, {training.step} steps on {device.type}")


if __name__ == "__main__":
    main()
