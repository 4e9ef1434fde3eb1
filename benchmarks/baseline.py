"""How well does a network that no one here designed do, trained on the same cases with the same budget?

    python -m benchmarks.baseline --data OPENKBP [--config openkbp7] [--steps N] [--resume]
    anatomynet-train --data OPENKBP --steps 1000 --output thousand.safetensors      # for as many steps of AnatomyNet:
    python -m benchmarks.baseline --data OPENKBP --steps 1000 --checkpoint thousand.safetensors

MONAI's DynUNet, the U-Net that nnU-Net plans, learns by the same `Training`: the same steps, crops, augmentation, loss,
averaged weights and validation; only the network differs. The best checkpoint is measured as benchmarks.accuracy
measures ours, the shipped one where no --checkpoint is given, and both stand in one table. Writes
benchmarks/results/baseline.json.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from anatomynet.engine.command import reports_errors
from anatomynet.engine.config import ModelConfig, TrainConfig, load_config
from anatomynet.engine.data import find_cases
from anatomynet.engine.network import AIR
from anatomynet.engine.runtime import Runtime, TorchRuntime
from anatomynet.engine.survey import survey_archive
from anatomynet.engine.train import cases_to_learn_from, finder_for, fit, patient_counts
from anatomynet.engine.training import Training
from benchmarks.accuracy import CAUTION, PUBLISHED, measured, runtime_from_checkpoint
from benchmarks.common import machine, write_result

# As nnU-Net plans for crops of 64 x 64 x 80 voxels of about 3 x 4 x 4 mm: halved three times, 32 channels at first.
FILTERS = (32, 64, 128, 256)
STRIDES = (1, 2, 2, 2)
COLUMNS = {"dice": ("DSC", 3), "surface_dice": ("surface DSC", 3), "hd95_mm": ("HD95 mm, median", 1)}


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder with train/ and validation/.")
@click.option("--config", default="openkbp7", show_default=True, help="A shipped configuration, or a TOML file.")
@click.option("--output", type=click.Path(path_type=Path), default="runs/baseline.safetensors", show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="Instead of the configuration's.")
@click.option("--resume", is_flag=True, help="Go on from the state beside --output.")
@click.option("--limit", type=click.IntRange(min=1), help="Measure only so many cases.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Of AnatomyNet, to stand beside; the shipped one.")
@click.option("--name", default="baseline", show_default=True, help="Of the JSON in benchmarks/results; '' is none.")
@reports_errors
def main(
    data: Path,
    config: str,
    output: Path,
    steps: int | None,
    resume: bool,
    limit: int | None,
    checkpoint: Path | None,
    name: str,
) -> None:
    """Train DynUNet by a configuration's recipe, and measure it beside AnatomyNet."""
    model, train = load_config(config)
    train = replace(train, steps=steps or train.steps)
    output.parent.mkdir(parents=True, exist_ok=True)
    baseline = trained(data, model, train, output, resume=resume)
    folders = find_cases(data / "validation")[:limit]
    results = {
        "AnatomyNet": measured(folders, runtime_from_checkpoint(checkpoint), seed=train.seed),
        "DynUNet": measured(folders, baseline, seed=train.seed),
    }
    for line in table(results, model):
        click.echo(line)
    if name:
        sizes = {"AnatomyNet": parameters(Training(model, train, torch.device("cpu")).network)}
        sizes["DynUNet"] = parameters(DynUNetOfAnySize(model.classes))
        write_result(name, {**machine(), "steps": train.steps, "parameters": sizes, "networks": results})


class DynUNetOfAnySize(nn.Module):
    """DynUNet, padded with air to what its down-samplings divide.

    Input: float (n, 1, z, y, x), normalised to -1..1; output: logits (n, classes, z, y, x).
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        from monai.networks.nets.dynunet import DynUNet

        kernels = [3] * len(STRIDES)
        network = DynUNet(3, 1, classes, kernels, STRIDES, STRIDES[1:], filters=FILTERS)
        # All that its `forward` uses, once: the network itself registers its layers twice.
        self.layers = nn.Sequential(network.skip_layers, network.output_block)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        unit = 2 ** (len(STRIDES) - 1)
        depth, height, width = x.shape[2:]
        pad = (0, -width % unit, 0, -height % unit, 0, -depth % unit)
        logits: Tensor = self.layers(F.pad(x, pad, value=AIR))
        return logits[:, :, :depth, :height, :width]


def trained(data: Path, model: ModelConfig, train: TrainConfig, output: Path, *, resume: bool) -> Runtime:
    """The best of a run over the cases that anatomynet-train takes, ready to draw."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training = Training(model, train, device, new_network=DynUNetOfAnySize)
    if resume:
        training.restore(output.with_suffix(".state.safetensors"))
    finder = finder_for(train)
    taught, held_out = survey_archive(data, model)
    training.take_cases({survey.folder: survey.digests for survey in (taught, held_out)}, archive=data)
    cases = cases_to_learn_from(taught)
    training.count_patients(patient_counts(cases))
    fit(training, cases, held_out.cases, output, region_finder=finder)
    network = DynUNetOfAnySize(model.classes)
    network.load_state_dict(load_file(output))
    return TorchRuntime(network.eval(), training.model, device)


def parameters(network: nn.Module) -> int:
    """How many weights are learnt."""
    return sum(weights.numel() for weights in network.parameters())


def table(results: dict[str, dict[str, Any]], model: ModelConfig) -> list[str]:
    """A line a structure: both networks side by side, then what others published elsewhere."""
    names = list(results)
    cells = [f"{f'{name} {title}':>28}" for title, _ in COLUMNS.values() for name in names]
    lines = [f"{'':<16}{'cases':>6}" + "".join(cells)]
    for position, structure in enumerate((*model.structures, "mean")):
        rows = [results[name]["structures"][position] for name in names]
        values = [_cell(row[key], key, digits) for key, (_, digits) in COLUMNS.items() for row in rows]
        lines.append(f"{structure:<16}{rows[0]['cases']:>6}" + "".join(f"{value:>28}" for value in values))
    lines += [f"  {paper['network']}: DSC {paper['dice']} over PDDCA's nine organs" for paper in PUBLISHED]
    return [*lines, CAUTION]


def _cell(measure: dict[str, Any], key: str, digits: int) -> str:
    value = measure.get("median") if key.endswith("_mm") else measure["mean"]
    return "" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    main()
