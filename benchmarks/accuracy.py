"""How well does a checkpoint agree with the physicians on a folder of cases?

    python -m benchmarks.accuracy OPENKBP/validation [--checkpoint FILE] [--mirror] [--plot]
    python -m benchmarks.accuracy OPENKBP/validation --checkpoint FILE.onnx   # OpenVINO, ONNX Runtime
    python -m benchmarks.accuracy OPENKBP/validation --url localhost:8001     # Triton

Every case of the folder (the PDDCA layout) is drawn by the same `segment` that serves, on its own grid. A structure
that is not annotated does not count; one that is annotated and not drawn counts as a miss, with the worst scores. A
case that cannot be read is named and left out.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.command import reports_errors
from anatomynet.engine.data import Case, find_cases, read_case
from anatomynet.engine.errors import DataError, GeometryError, ModelError
from anatomynet.engine.metrics import Agreement, compare_label_maps
from anatomynet.engine.runtime import Runtime, TorchRuntime, load_runtime
from anatomynet.engine.segment import draw_reduced, segment
from anatomynet.engine.structures import structures_by_name
from anatomynet.engine.volume import LabelMap
from benchmarks.common import RESULTS, machine, write_result
from benchmarks.mirror import MirroredNetwork

# Of an Agreement: what each is called, and its digits after the point.
MEASURES = {
    "dice": ("DSC", 3),
    "surface_dice": ("surface DSC", 3),
    "hd95_mm": ("HD95 mm", 1),
    "mean_surface_distance_mm": ("mean mm", 2),
    "added_path_length_mm": ("added path mm", 0),
}
MEDIANS = ("dice", "hd95_mm")  # printed too: one miss moves a mean far
PLOTTED = ("dice", "surface_dice", "hd95_mm", "added_path_length_mm")
SMALLEST_MM = 1.0  # of the plots in mm: below it they are linear
RESAMPLINGS = 2000
INTERVAL = (2.5, 97.5)  # percentiles: 95 %
# Published means: DSC over the nine organs of the MICCAI 2015 challenge's test set (PDDCA), which each paper compares
# itself on; HD95 over 28 organs of UaNet's own test set, on which its authors trained AnatomyNet too.
PUBLISHED: tuple[dict[str, Any], ...] = (
    {"network": "best of MICCAI 2015", "dice": 0.76, "source": "Raudaschl et al., Med Phys 2017;44:2020-2036"},
    {"network": "AnatomyNet", "dice": 0.7925, "hd95_mm": 21.96, "source": "Zhu et al., Med Phys 2019;46:576-589"},
    {"network": "FocusNet", "dice": 0.803, "source": "Gao et al., MICCAI 2019"},
    {"network": "UaNet", "dice": 0.8123, "hd95_mm": 6.21, "source": "Tang et al., Nat Mach Intell 2019;1:480-491"},
)
CAUTION = "Not to be set against the figures above: the patients, the physicians, the organs and the voxel size differ."

Values = NDArray[np.float64]


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help=".safetensors or .onnx; the shipped checkpoint.")
@click.option("--url", help="Triton server, HOST:PORT of its gRPC, instead of a checkpoint.")
@click.option("--mirror", is_flag=True, help="Average over the CT and its mirror image; .safetensors only.")
@click.option("--name", default="accuracy", show_default=True, help="Of the files in benchmarks/results.")
@click.option("--limit", type=click.IntRange(min=1), help="Only so many cases.")
@click.option("--seed", default=1808, show_default=True, help="Of the bootstrap.")
@click.option("--plot", is_flag=True, help="A box plot beside the JSON.")
@reports_errors
def main(
    data: Path,
    checkpoint: Path | None,
    url: str | None,
    mirror: bool,
    name: str,
    limit: int | None,
    seed: int,
    plot: bool,
) -> None:
    """Measure a checkpoint on the cases in the folder DATA."""
    folders = find_cases(data)[:limit]
    with opened_runtime(checkpoint, url=url, mirror=mirror) as runtime:
        result = measured(folders, runtime, seed=seed)
    result["data"] = f"{data.resolve().parent.name}/{data.name}"
    result["mirror"] = mirror
    write_result(name, result)
    for line in table(result):
        click.echo(line)
    if plot:
        write_box_plot(RESULTS / f"{name}.png", result)


@contextmanager
def opened_runtime(checkpoint: Path | None, *, url: str | None, mirror: bool) -> Iterator[Runtime]:
    """The runtime to be measured: a server, or a file through `runtime_from_checkpoint`.

    Raises:
        ModelError: a checkpoint and a server at once; a file that cannot be used.
        ServerError: no server there.
    """
    if url and (checkpoint or mirror):
        raise ModelError("--url measures what the server has: expected it without --checkpoint and --mirror")
    if url:
        with closing(TritonRuntime(url)) as runtime:
            yield runtime
    else:
        yield runtime_from_checkpoint(checkpoint, mirror=mirror)


def runtime_from_checkpoint(checkpoint: Path | None, *, mirror: bool = False) -> Runtime:
    """A .safetensors file through PyTorch, a .onnx file through the fastest runtime here; None is the shipped one.

    Raises:
        ModelError: a file that cannot be used; an ONNX file that is to be mirrored: its graph ends in labels.
    """
    if checkpoint is not None and checkpoint.suffix == ".onnx":
        if mirror:
            raise ModelError(f"--mirror averages probabilities, which {checkpoint} keeps to itself: give .safetensors")
        return load_runtime(checkpoint)
    network, model = load_checkpoint(checkpoint)
    return TorchRuntime(MirroredNetwork(network, model) if mirror else network, model)


def measured(folders: Sequence[Path], runtime: Runtime, *, seed: int) -> dict[str, Any]:
    """The agreement with the physicians on each case folder, as what is written.

    Raises:
        DataError: no case can be measured.
    """
    structures = runtime.model.structures
    agreements, left_out = [], []
    with click.progressbar(folders, label="drawing", show_pos=True) as bar:
        for folder in bar:
            try:
                agreements.append(agreements_of(read_case(folder, structures), runtime))
            except (DataError, GeometryError) as error:
                left_out.append(folder.name)
                click.echo(f"left out {folder.name}: {error}", err=True)
    if not agreements:
        raise DataError(
            f"none of {len(folders)} cases can be measured, of {', '.join(structures)}: see what was left out"
        )
    return {
        **machine(),
        "runtime": runtime.description,
        "checkpoint_sha256": runtime.model.checkpoint_sha256,
        "cases": len(agreements),
        "left_out": left_out,
        "bootstrap": {"resamplings": RESAMPLINGS, "seed": seed, "interval_percentiles": INTERVAL},
        "structures": summary(agreements, structures, np.random.default_rng(seed)),
        "published": PUBLISHED,
    }


def agreements_of(case: Case, runtime: Runtime) -> dict[str, Agreement]:
    """The agreement on each structure that is annotated, on the case's own grid."""
    model = runtime.model
    reduced = case.volume.geometry.spacing[0] > model.largest_spacing[0] * model.in_plane_stride**0.5
    drawn = draw_reduced(case.volume, runtime) if reduced else segment(case.volume, runtime)
    structures = structures_by_name(model.structures)
    truth = LabelMap(case.labels, case.volume.geometry, structures)
    annotated = {name for name, known in zip(model.structures, case.annotated, strict=True) if known}
    return {a.structure: a for a in compare_label_maps(drawn, truth) if a.structure in annotated}


def summary(
    agreements: list[dict[str, Agreement]], structures: Iterable[str], random: np.random.Generator
) -> list[dict[str, Any]]:
    """For each structure, and for the mean of them: cases, misses, means with intervals, medians, and every value."""
    names = list(structures)
    draws = random.multinomial(len(agreements), np.full(len(agreements), 1 / len(agreements)), RESAMPLINGS)
    rows: list[dict[str, Any]] = [
        {
            "structure": name,
            "cases": sum(name in case for case in agreements),
            "missed": sum(case[name].outcome == "missed" for case in agreements if name in case),
        }
        for name in names
    ]
    rows.append({key: sum(row[key] for row in rows) for key in ("cases", "missed")} | {"structure": "mean"})
    for key in MEASURES:
        values = np.array([[getattr(case[n], key) if n in case else np.nan for n in names] for case in agreements])
        means = np.vstack((_column_means(values, np.ones((1, len(values)))), _column_means(values, draws)))
        # The mean of the structures' means: each counts the same, however often it is annotated.
        means = np.column_stack((means, means[:, np.isfinite(means[0])].mean(axis=1)))
        for column, row in enumerate(rows):
            row[key] = _with_interval(means[:, column])
            if column < len(names):
                known = values[np.isfinite(values[:, column]), column]
                row[key]["median"] = round(float(np.median(known)), 4) if known.size else None
                row[key]["values"] = [round(float(v), 4) for v in known]
    return rows


def _column_means(values: Values, weights: NDArray[Any]) -> Values:
    """Means (weightings, columns) of (cases, columns) for (weightings, cases); NaN where nothing has a weight."""
    present = np.isfinite(values)
    count = weights @ present
    total = weights @ np.where(present, values, 0)
    means: Values = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
    return means


def _with_interval(means: Values) -> dict[str, Any]:
    """The first mean, and the percentiles of the resampled ones."""
    if not np.isfinite(means[0]):
        return {"mean": None, "interval": None}
    low, high = np.nanpercentile(means[1:], INTERVAL)
    return {"mean": round(float(means[0]), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def table(result: dict[str, Any]) -> Iterable[str]:
    """What is printed: means with 95 % intervals, medians, and what others published, with what keeps them apart."""
    yield f"checkpoint {result['checkpoint_sha256'][:12]} on {result['cases']} cases of {result['data']}"
    if result.get("left_out"):
        many = len(result["left_out"])
        yield f"{many} case{'s' if many > 1 else ''} left out: {', '.join(result['left_out'])}"
    titles = (
        f"{title:>30}" + (f"{f'{title}, median':>18}" if key in MEDIANS else "") for key, (title, _) in MEASURES.items()
    )
    yield f"{'':<16}{'cases':>6}{'missed':>7}" + "".join(titles)
    for row in result["structures"]:
        cells = "".join(
            f"{_cell(row[key], digits):>30}" + (f"{_median(row[key], digits):>18}" if key in MEDIANS else "")
            for key, (_, digits) in MEASURES.items()
        )
        yield f"{row['structure']:<16}{row['cases']:>6}{row['missed']:>7}{cells}"
    yield "Published means: DSC over PDDCA's nine organs; HD95 over 28 organs, both by Tang et al. on their own data"
    for paper in result["published"]:
        hd95 = f"{paper['hd95_mm']:.1f} mm" if "hd95_mm" in paper else ""
        yield f"  {paper['network']:<22}{paper['dice']:<8}{hd95:<10}{paper['source']}"
    yield CAUTION


def _cell(measure: dict[str, Any], digits: int) -> str:
    if measure["mean"] is None:
        return "not annotated"
    low, high = measure["interval"]
    return f"{measure['mean']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _median(measure: dict[str, Any], digits: int) -> str:
    """Empty where nothing is annotated, and for the mean of the structures."""
    median = measure.get("median")
    return "" if median is None else f"{median:.{digits}f}"


def write_box_plot(path: Path, result: dict[str, Any]) -> None:
    """A box a structure, a field a measure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["structures"] if row["cases"] and row["structure"] != "mean"]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 8), layout="constrained")
    for axis, key in zip(axes.flat, PLOTTED, strict=True):
        labels = [f"{row['structure']} ({row['cases']})" for row in rows]
        axis.boxplot([row[key]["values"] for row in rows], tick_labels=labels)
        axis.set_title(MEASURES[key][0])
        if key.endswith("dice"):
            axis.set_ylim(0, 1)
        else:
            axis.set_yscale("symlog", linthresh=SMALLEST_MM)  # a miss is far away from all else
            axis.set_ylim(bottom=0)
        axis.tick_params(axis="x", rotation=45)
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle(f"{result['data']}: {result['cases']} cases, checkpoint {result['checkpoint_sha256'][:12]}")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
