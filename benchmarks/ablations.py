"""What does each part of the paper give on this data? Its ablations, with seeds, in one table.

    python -m benchmarks.ablations --data OPENKBP                                                # for a GPU
    python -m benchmarks.ablations --data OPENKBP --recipe paper --config openkbp7               # the paper's own loss
    python -m benchmarks.ablations --phantoms 4 --steps 5 --seeds 2 --name ""                    # does it run?

Zhu et al. compare squeeze-and-excitation, residual blocks, one or more down-samplings, the losses, and masks. Every
variant changes one thing of a recipe, and is as good as these steps make it:

    configured    all of the configuration, here ablations.toml: the marginal loss with lambda 20, which has learnt
                  most structures after a thousand steps, so that there is something to compare
    paper         the configuration with the paper's loss, Dice + 0.5 x focal, masked: that takes far longer

All variants run with the first seed, then with the next; benchmarks/results/ablations.json is written anew after every
run, so that one cut short leaves what is done. A network that learns crops as the region finder's is validated in its
boxes.
"""

import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from anatomynet.engine.command import reports_errors
from anatomynet.engine.config import ModelConfig, TrainConfig, load_config
from anatomynet.engine.data import Case
from anatomynet.engine.errors import DataError
from anatomynet.engine.network import AnatomyNet, ResidualBlock, SqueezeExcitation
from anatomynet.engine.survey import survey_archive
from anatomynet.engine.train import cases_to_learn_from, finder_for, phantom_case, validate
from benchmarks.common import machine, write_result
from benchmarks.oar9_phantoms import FIRST_UNSEEN_SEED, device_name, trained, with_structures_withheld

PAPER: dict[str, Any] = {"focal_weight": 0.5, "focal_gamma": 2.0, "missing": "mask", "class_weights": ()}
PATIENTS: dict[str, Any] = {"phantom_share": 0.0}  # alone


@dataclass(frozen=True)
class Variant:
    """One thing changed.

    Attributes:
        name: in the table.
        new_network: of so many classes.
        train: what of the TrainConfig is otherwise.
        blind: what is not annotated counts as background.
    """

    name: str
    new_network: Callable[[int], nn.Module] = AnatomyNet
    train: dict[str, Any] = field(default_factory=dict)
    blind: bool = False


def without_squeeze_excitation(classes: int) -> AnatomyNet:
    """AnatomyNet whose blocks do not weigh their channels."""
    network = AnatomyNet(classes)
    for block in network.modules():
        if isinstance(block, ResidualBlock) and isinstance(block.recalibrate, SqueezeExcitation):
            block.recalibrate = nn.Identity()
    return network


class _Nothing(nn.Module):
    """What a shortcut adds where there is none."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def without_residuals(classes: int) -> AnatomyNet:
    """AnatomyNet whose blocks have no shortcut."""
    network = AnatomyNet(classes)
    for block in network.modules():
        if isinstance(block, ResidualBlock):
            block.shortcut = _Nothing()
    return network


class TwoDownSamplings(AnatomyNet):
    """AnatomyNet that halves its resolution once more after the encoder's first stage, and doubles it again in the
    decoder; no further weights."""

    def logits_of_even_sides(self, x: Tensor) -> Tensor:
        """See AnatomyNet."""
        stem = self.stem(x)
        half = self.encoder[0](stem)
        quarter = self.encoder[1](F.max_pool3d(half, 2, ceil_mode=True))
        deep = self.decoder[0](torch.cat((self.encoder[2](quarter), quarter), dim=1))
        deep = F.interpolate(deep, size=half.shape[2:], mode="trilinear", align_corners=False)
        y = self.decoder[1](torch.cat((deep, half), dim=1))
        y = self.decoder[2](torch.cat((y, stem), dim=1))
        y = self.head(torch.cat((self.upsample(y), x), dim=1))
        logits: Tensor = self.classify(y)
        return logits


CHANGES = (
    Variant("no squeeze-and-excitation", without_squeeze_excitation),
    Variant("no residuals", without_residuals),
    Variant("two down-samplings", TwoDownSamplings),
    Variant("Dice alone", train={"focal_weight": 0.0}),
    Variant("Dice + cross-entropy", train={"focal_gamma": 0.0}),
    Variant("no masks", blind=True),
)


@dataclass(frozen=True)
class Recipe:
    """Where every variant begins.

    Attributes:
        train: what of the configuration's TrainConfig is otherwise.
        variants: the recipe itself, and each change of it.
    """

    train: dict[str, Any]
    variants: tuple[Variant, ...]


RECIPES = {
    "configured": Recipe(
        {},
        (
            Variant("as configured"),
            *CHANGES,
            Variant("masks, the background with them", train={"missing": "mask"}),
            Variant("the paper's lambda, 0.5", train={"focal_weight": PAPER["focal_weight"]}),
        ),
    ),
    "paper": Recipe(
        PAPER,
        (
            Variant("as published"),
            *CHANGES,
            Variant("masks, the rest background", train={"missing": "marginal"}),
        ),
    ),
}
CONFIG = Path(__file__).with_suffix(".toml")


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder with train/ and validation/.")
@click.option("--phantoms", type=click.IntRange(min=2), help="Instead: so many phantoms, structures withheld.")
@click.option(
    "--config", default=str(CONFIG), help="A shipped configuration, or a TOML file; ablations.toml beside this."
)
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="configured", show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="Instead of the configuration's.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Runs of each variant.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Runs at once, a process each.")
@click.option("--variant", "chosen", multiple=True, help="Only this one; may be given again.")
@click.option("--name", default="ablations", show_default=True, help="Of the JSON in benchmarks/results; '' is none.")
@reports_errors
def main(
    data: Path | None,
    phantoms: int | None,
    config: str,
    recipe: str,
    steps: int | None,
    seeds: int,
    jobs: int,
    chosen: tuple[str, ...],
    name: str,
) -> None:
    """Train every variant with every seed, and compare them on the validation cases."""
    model, train = load_config(config)
    train = replace(train, steps=steps or train.steps, **RECIPES[recipe].train, **PATIENTS)
    variants = variants_named(chosen, RECIPES[recipe])
    taught, held_out = cases_of(data, phantoms, model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {"data": str(data.resolve().name) if data else f"{phantoms} phantoms", "steps": train.steps}
    about |= {"recipe": recipe, "train": asdict(train)}
    result = {**machine(), "device": device_name(device), **about, "cases": len(taught), "jobs": jobs}
    planned = [(variant, seed) for seed in range(train.seed, train.seed + seeds) for variant in variants]
    names = [variant.name for variant in variants]
    done: list[dict[str, Any]] = []
    for run in finished_runs(Task(taught, held_out, model, train, device), planned, jobs):
        done.append(run)
        click.echo(f"{len(done)} of {len(planned)}  " + run_line(run))
        if name:
            state = {"complete": len(done) == len(planned), "planned": len(planned), "done": len(done)}
            failed = [run for run in done if "failed" in run]
            write_result(name, {**result, **state, "failed": failed, "variants": rows_of(done, names)})
    for row in rows_of(done, names):
        click.echo(table_line(row, model))


def variants_named(names: Sequence[str], recipe: Recipe) -> list[Variant]:
    """Those of a recipe that have these names; all where there is none.

    Raises:
        DataError: a name that is none of them.
    """
    known = {variant.name: variant for variant in recipe.variants}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(f"no variant {unknown[0]!r}: expected one of {', '.join(known)}")
    return [known[name] for name in names or known]


def cases_of(data: Path | None, phantoms: int | None, model: ModelConfig) -> tuple[list[Case], list[Case]]:
    """Cases to learn from, and cases to validate with; a quarter of the phantoms more are validated with.

    Raises:
        DataError: neither a folder nor phantoms, or both; a folder without usable cases.
    """
    if (data is None) == (phantoms is None):
        raise DataError("nothing to learn from, or two things: expected --data FOLDER or --phantoms N")
    if data:
        taught, held_out = survey_archive(data, model)
        return cases_to_learn_from(taught), held_out.cases
    x, y, z = ((low + high) / 2 for low, high in zip(model.smallest_spacing, model.largest_spacing, strict=True))
    spacing = (x * model.in_plane_stride, y * model.in_plane_stride, z)
    count = phantoms or 0
    seeds = [*range(count), *range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + max(1, count // 4))]
    made = [phantom_case(model, spacing=spacing, seed=seed) for seed in tqdm(seeds, desc="phantoms")]
    return with_structures_withheld(made[:count], seed=0), made[count:]


@dataclass(frozen=True, eq=False)
class Task:
    """What all runs share: cases to learn from and to validate with, model, recipe, and device."""

    taught: list[Case]
    held_out: list[Case]
    model: ModelConfig
    train: TrainConfig
    device: torch.device


Planned = tuple[Variant, int]  # and the seed


def finished_runs(task: Task, planned: Sequence[Planned], jobs: int) -> Iterator[dict[str, Any]]:
    """Each run as it ends, begun in the order planned; what failed says why, and the others go on."""
    if jobs == 1:
        yield from (run_of(task, one) for one in planned)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.pickle"
        file.write_bytes(pickle.dumps(task))
        # Not forked: each its own CUDA context. Not an executor, which a worker that is killed takes down.
        with get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool:
            yield from pool.imap_unordered(partial(_run_of_file, file), planned)
            pool.close()
            pool.join()


def _run_of_file(file: Path, one: Planned) -> dict[str, Any]:
    return run_of(_task_of(file), one)


@lru_cache(1)
def _task_of(file: Path) -> Task:
    task: Task = pickle.loads(file.read_bytes())
    return task


def run_of(task: Task, one: Planned) -> dict[str, Any]:
    """One run: variant, seed, seconds, and the mean DSC of each structure; or why it failed, as CUDA tells it."""
    (variant, seed), start = one, time.perf_counter()
    told: dict[str, Any]
    try:
        told = {"dice": scores_of(variant, task, seed)}
    except RuntimeError as error:
        told = {"failed": str(error).splitlines()[0]}
    return {"variant": variant.name, "seed": seed, "seconds": round(time.perf_counter() - start), **told}


def scores_of(variant: Variant, task: Task, seed: int) -> dict[str, float]:
    """Mean DSC of each structure that is validated, after one run."""
    train, taught = replace(task.train, seed=seed, **variant.train), task.taught
    if variant.blind:
        taught = [replace(case, annotated=(True,) * len(case.annotated)) for case in taught]
    training = trained(taught, task.model, train, task.device, new_network=variant.new_network)
    finder = finder_for(train)
    scores = validate(training.average, task.model, task.held_out, task.device, region_finder=finder)
    return {name: round(float(np.mean(values)), 4) for name, values in scores.items() if values}


def rows_of(done: Sequence[dict[str, Any]], variants: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each variant that has a run, in their order.

    Means are over the seeds that every variant has done, so that a table cut short compares like with like; before
    there is such a seed, over each variant's own.
    """
    runs = {variant: [run for run in done if run["variant"] == variant and "dice" in run] for variant in variants}
    common = set.intersection(*({run["seed"] for run in of_one} for of_one in runs.values()))
    rows = []
    for variant, of_one in runs.items():
        if of_one:
            counted = sorted(
                (run for run in of_one if run["seed"] in common or not common), key=lambda run: run["seed"]
            )
            rows.append({"variant": variant, **mean_and_spread(counted), "runs": of_one})
    return rows


def mean_and_spread(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean DSC over the structures: its mean over the runs and their standard deviation (None of one run), and the
    mean of each structure."""
    means = [float(np.mean(list(run["dice"].values()))) for run in runs]
    return {
        "seeds": [run["seed"] for run in runs],
        "dice": round(float(np.mean(means)), 4),
        "spread": round(float(np.std(means, ddof=1)), 4) if len(means) > 1 else None,
        "structures": {name: round(float(np.mean([run["dice"][name] for run in runs])), 4) for name in runs[0]["dice"]},
    }


def run_line(run: dict[str, Any]) -> str:
    """One run: what, how long, and its mean DSC or what went wrong."""
    outcome = run["failed"] if "failed" in run else f"{np.mean(list(run['dice'].values())):.3f}"
    return f"{run['variant']}, seed {run['seed']}, {run['seconds']} s: {outcome}"


def table_line(row: dict[str, Any], model: ModelConfig) -> str:
    """One variant: mean, spread, and each structure's mean."""
    spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
    each = "  ".join(f"{name} {row['structures'][name]:.3f}" for name in model.structures if name in row["structures"])
    return f"{row['variant']:<33}{row['dice']:.3f}{spread}   {each}"


if __name__ == "__main__":
    main()
