"""What does each part of the paper give on this data? Its ablations, with seeds, in one table.

    python -m benchmarks.ablations --data OPENKBP --steps 7000 --seeds 3          # for a GPU
    python -m benchmarks.ablations --phantoms 4 --steps 5 --seeds 2 --name ""                    # does it run?

Zhu et al. compare squeeze-and-excitation, residual blocks, one or more down-samplings, the losses, and masks. Every
variant changes one thing of AnatomyNet with the paper's loss (Dice + 0.5 x focal, masked); the rest of the recipe is
the configuration's, so a variant is as good as these steps make it. Writes benchmarks/results/ablations.json.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from anatomynet.engine.data import Case, cut_to_body, cut_to_head_and_neck
from anatomynet.engine.errors import DataError
from anatomynet.engine.network import AnatomyNet, ResidualBlock, SqueezeExcitation
from anatomynet.engine.survey import survey_cases
from anatomynet.engine.train import phantom_case, samples, validate
from anatomynet.engine.training import Training
from benchmarks.common import machine, write_result
from benchmarks.oar9_phantoms import FIRST_UNSEEN_SEED, with_structures_withheld

PAPER: dict[str, Any] = {"focal_weight": 0.5, "focal_gamma": 2.0, "missing": "mask", "class_weights": ()}


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


VARIANTS = (
    Variant("as published"),
    Variant("no squeeze-and-excitation", without_squeeze_excitation),
    Variant("no residuals", without_residuals),
    Variant("two down-samplings", TwoDownSamplings),
    Variant("Dice alone", train={"focal_weight": 0.0}),
    Variant("Dice + cross-entropy", train={"focal_gamma": 0.0}),
    Variant("no masks", blind=True),
    Variant("masks, the rest background", train={"missing": "marginal"}),
)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder with train/ and validation/.")
@click.option("--phantoms", type=click.IntRange(min=2), help="Instead: so many phantoms, structures withheld.")
@click.option("--config", default="openkbp7", show_default=True, help="A shipped configuration, or a TOML file.")
@click.option("--steps", type=click.IntRange(min=1), help="Instead of the configuration's.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Runs of each variant.")
@click.option("--variant", "chosen", multiple=True, help="Only this one; may be given again.")
@click.option("--name", default="ablations", show_default=True, help="Of the JSON in benchmarks/results; '' is none.")
@reports_errors
def main(
    data: Path | None,
    phantoms: int | None,
    config: str,
    steps: int | None,
    seeds: int,
    chosen: tuple[str, ...],
    name: str,
) -> None:
    """Train every variant with every seed, and compare them on the validation cases."""
    model, train = load_config(config)
    train = replace(train, steps=steps or train.steps, **PAPER)
    taught, held_out = cases_of(data, phantoms, model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for variant in variants_named(chosen):
        runs = []
        for seed in range(train.seed, train.seed + seeds):
            start = time.perf_counter()
            scores = scores_of(variant, taught, held_out, model=model, train=replace(train, seed=seed), device=device)
            runs.append({"seed": seed, "seconds": round(time.perf_counter() - start), "dice": scores})
        rows.append({"variant": variant.name, **mean_and_spread(runs), "runs": runs})
        click.echo(table_line(rows[-1], model))
    if name:
        about = {"data": str(data.resolve().name) if data else f"{phantoms} phantoms", "steps": train.steps}
        write_result(name, {**machine(), "device": device.type, **about, "cases": len(taught), "variants": rows})


def variants_named(names: Sequence[str]) -> list[Variant]:
    """Those of these names; all where there is none.

    Raises:
        DataError: a name that is none of them.
    """
    known = {variant.name: variant for variant in VARIANTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(f"no variant {unknown[0]!r}: expected one of {', '.join(known)}")
    return [known[name] for name in names] if names else list(VARIANTS)


def cases_of(data: Path | None, phantoms: int | None, model: ModelConfig) -> tuple[list[Case], list[Case]]:
    """Cases to learn from, and cases to validate with; a quarter of the phantoms more are validated with.

    Raises:
        DataError: neither a folder nor phantoms, or both; a folder without usable cases.
    """
    if (data is None) == (phantoms is None):
        raise DataError("nothing to learn from, or two things: expected --data FOLDER or --phantoms N")
    if data:
        surveys = [survey_cases(data / name, model) for name in ("train", "validation")]
        return [cut_to_body(cut_to_head_and_neck(case)) for case in surveys[0].cases], surveys[1].cases
    x, y, z = ((low + high) / 2 for low, high in zip(model.smallest_spacing, model.largest_spacing, strict=True))
    spacing = (x * model.in_plane_stride, y * model.in_plane_stride, z)
    count = phantoms or 0
    seeds = [*range(count), *range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + max(1, count // 4))]
    made = [phantom_case(model, spacing=spacing, seed=seed) for seed in tqdm(seeds, desc="phantoms")]
    return with_structures_withheld(made[:count], seed=0), made[count:]


def scores_of(
    variant: Variant,
    taught: list[Case],
    held_out: list[Case],
    *,
    model: ModelConfig,
    train: TrainConfig,
    device: torch.device,
) -> dict[str, float]:
    """Mean DSC of each structure that is validated, after one run."""
    train = replace(train, **variant.train)
    if variant.blind:
        taught = [replace(case, annotated=(True,) * len(case.annotated)) for case in taught]
    training = Training(model, train, device, new_network=variant.new_network)
    for sample in tqdm(samples(taught, model, train, first=0), total=train.steps, desc=variant.name, unit="step"):
        training.learn(sample)
    scores = validate(training.average, model, held_out, device)
    return {name: round(float(np.mean(values)), 4) for name, values in scores.items() if values}


def mean_and_spread(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean DSC over the structures: its mean over the runs and their standard deviation (None of one run), and the
    mean of each structure."""
    means = [float(np.mean(list(run["dice"].values()))) for run in runs]
    return {
        "dice": round(float(np.mean(means)), 4),
        "spread": round(float(np.std(means, ddof=1)), 4) if len(means) > 1 else None,
        "structures": {name: round(float(np.mean([run["dice"][name] for run in runs])), 4) for name in runs[0]["dice"]},
    }


def table_line(row: dict[str, Any], model: ModelConfig) -> str:
    """One variant: mean, spread, and each structure's mean."""
    spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
    each = "  ".join(f"{name} {row['structures'][name]:.3f}" for name in model.structures if name in row["structures"])
    return f"{row['variant']:<28}{row['dice']:.3f}{spread}   {each}"


if __name__ == "__main__":
    main()
