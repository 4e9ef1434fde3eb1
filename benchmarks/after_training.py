"""What can be gained without learning anything more? Strays, mirror images, a background that weighs more.

    python -m benchmarks.after_training OPENKBP/validation [--checkpoint FILE]

Every case is seen once as it is and once mirrored, whole body, on the network's own grid (the archive comes reduced to
it); then its voxels are given to structures in several ways, and each way's mean DSC stands in one table. What serves
is "strays dropped". Writes benchmarks/results/after_training.json.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.command import reports_errors
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.data import Case, cut_to_body, find_cases, read_case
from anatomynet.engine.metrics import dice
from anatomynet.engine.network import normalised_from_hu
from anatomynet.engine.postprocess import drop_strays
from anatomynet.engine.volume import LabelArray
from benchmarks.common import machine, write_result
from benchmarks.mirror import MirroredNetwork

# Added to the background's logit. What is drawn is 6 % larger than what the physicians drew, in the median.
BACKGROUND = 0.6


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help=".safetensors; the shipped checkpoint.")
@click.option(
    "--name", default="after_training", show_default=True, help="Of the JSON in benchmarks/results; '' is none."
)
@reports_errors
def main(data: Path, checkpoint: Path | None, name: str) -> None:
    """Compare ways to make structures of what a network says, on the cases in DATA."""
    network, model = load_checkpoint(checkpoint)
    looks = {"once": network.eval(), "mirrored": MirroredNetwork(network, model).eval()}
    scores: dict[str, dict[str, list[float]]] = {}
    with click.progressbar(find_cases(data), label="drawing", show_pos=True) as bar:
        for folder in bar:
            case = cut_to_body(read_case(folder, model.structures))
            for way, labels in drawings(looks, case, model).items():
                add_scores(scores.setdefault(way, {}), labels, case, model)
    rows = [row_of(way, found) for way, found in scores.items()]
    for row in rows:
        values = "  ".join(f"{structure} {value:.3f}" for structure, value in row["structures"].items())
        click.echo(f"{row['way']:<40}{row['mean']:.4f}   {values}")
    if name:
        told = {"checkpoint_sha256": model.checkpoint_sha256, "background": BACKGROUND}
        write_result(name, {**machine(), **told, "rows": rows})


def drawings(looks: dict[str, nn.Module], case: Case, model: ModelConfig) -> dict[str, LabelArray]:
    """What each way draws on a case: uint8 (z, y, x)."""
    image = normalised_from_hu(torch.from_numpy(case.volume.hu), model.hu_window)[None, None]
    once, mirrored = (logits_of(looks[look], image) for look in ("once", "mirrored"))
    labels = labels_of(once)
    return {
        "as it comes": labels,
        "largest piece": each_structure(labels, largest_piece),
        "strays dropped": drop_strays(labels),
        "and the background weighs more": drop_strays(labels_of(once, background=BACKGROUND)),
        "and mirror images averaged": drop_strays(labels_of(mirrored)),
        "and both": drop_strays(labels_of(mirrored, background=BACKGROUND)),
    }


def logits_of(network: nn.Module, image: Tensor) -> Tensor:
    """Float (1, 1, z, y, x), of any sides -> logits (classes, z, y, x)."""
    depth, height, width = image.shape[2:]
    even = nn.functional.pad(image, (0, width % 2, 0, height % 2, 0, depth % 2), value=-1.0)
    with torch.inference_mode():
        logits: Tensor = network(even)[0, :, :depth, :height, :width]
    return logits


def labels_of(logits: Tensor, *, background: float = 0.0) -> LabelArray:
    """The likeliest class of each voxel, uint8 (z, y, x), after `background` was added to the background's logit."""
    weighed = logits.clone()
    weighed[0] += background
    labels: LabelArray = weighed.argmax(dim=0).to(torch.uint8).numpy()
    return labels


def each_structure(labels: LabelArray, change: Callable[[NDArray[np.bool_]], NDArray[np.bool_]]) -> LabelArray:
    """The labels, of each structure only what `change` keeps of its mask."""
    kept = np.zeros_like(labels)
    for label in range(1, int(labels.max(initial=0)) + 1):
        kept[change(labels == label)] = label
    return kept


def largest_piece(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Of a mask its largest 26-connected piece."""
    from scipy import ndimage

    pieces, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    largest = 1 + int(np.argmax(np.bincount(pieces.ravel(), minlength=2)[1:])) if count else 1
    found: NDArray[np.bool_] = pieces == largest
    return found


def add_scores(scores: dict[str, list[float]], labels: LabelArray, case: Case, model: ModelConfig) -> None:
    """Notes the DSC of every structure that the case has contours of."""
    for label, (structure, known) in enumerate(zip(model.structures, case.annotated, strict=True), start=1):
        if known:
            scores.setdefault(structure, []).append(dice(labels == label, case.labels == label))


def row_of(way: str, scores: dict[str, list[float]]) -> dict[str, Any]:
    """Mean DSC of each structure, and the mean of those."""
    means = {structure: round(float(np.mean(values)), 4) for structure, values in scores.items()}
    return {"way": way, "mean": round(float(np.mean(list(means.values()))), 4), "structures": means}


if __name__ == "__main__":
    main()
