"""Two structure sets of one CT -> how well they agree: a physician's contours and the network's, by name.

read_structures twice -> compare_structure_sets -> a table, JSON, CSV, a figure and an animation (overlay.py)
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from anatomynet.client.mask_files import read_structures
from anatomynet.client.structure_set import Roi, StructureSet
from anatomynet.client.study import CTSeries
from anatomynet.engine.aliases import Aliases, load_aliases, structure_from_roi_name
from anatomynet.engine.errors import StudyError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.metrics import Agreement, check_same_grid, compare_masks
from anatomynet.engine.output import write_whole
from anatomynet.engine.structures import STRUCTURES, Structure

# Of an Agreement, in the order and with the digits in which a reader wants them.
COLUMNS = (
    ("dice", "DSC", "{:.3f}"),
    ("surface_dice", "surface DSC", "{:.3f}"),
    ("tolerance_mm", "at mm", "{:.2f}"),
    ("hd95_mm", "HD95 mm", "{:.2f}"),
    ("mean_surface_distance_mm", "mean mm", "{:.2f}"),
    ("added_path_length_mm", "added path mm", "{:.0f}"),
    ("prediction_ml", "predicted ml", "{:.2f}"),
    ("reference_ml", "reference ml", "{:.2f}"),
)
MEANS = ("dice", "surface_dice", "hd95_mm", "mean_surface_distance_mm", "added_path_length_mm")
OUTCOMES = {
    "missed": "missed: the prediction is empty",
    "invented": "invented: the reference is empty",
    "absent": "empty in both",
}
NAME_WIDTH = 16  # of a TG-263 name


@dataclass(frozen=True, eq=False)
class ComparedRoi:
    """One structure as both drew it.

    Attributes:
        structure: what it is.
        prediction, reference: its ROI on either side.
        agreement: of the two.
    """

    structure: Structure
    prediction: Roi
    reference: Roi
    agreement: Agreement


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two structure sets of one CT.

    Attributes:
        geometry: of the CT.
        pairs: structures that both have, in the catalogue's order.
        problems: TG-263 name -> why that structure could not be compared.
    """

    geometry: VolumeGeometry
    pairs: tuple[ComparedRoi, ...]
    problems: dict[str, str]


def compare_files(prediction: Path, reference: Path, series: CTSeries, *, alias_file: Path | None = None) -> Comparison:
    """The agreement of two files on one CT, each an RTSTRUCT, a DICOM SEG, a NIfTI mask or a folder of them.

    Raises:
        StudyError: a file that cannot be read or was drawn on another CT; no structure in common.
        ModelError: a file of aliases that cannot be used.
    """
    aliases = load_aliases(alias_file)

    def known(name: str) -> bool:
        return structure_from_roi_name(name, aliases) is not None

    drawn, truth = (read_structures(path, series, wanted=known) for path in (prediction, reference))
    return compare_structure_sets(drawn, truth, aliases)


def compare_structure_sets(prediction: StructureSet, reference: StructureSet, aliases: Aliases) -> Comparison:
    """The agreement on each structure that both sides name.

    Args:
        prediction: of the network.
        reference: of the physician.
        aliases: which ROI name is which structure.

    Raises:
        GeometryError: structure sets on different grids.
        StudyError: no structure in common.
    """
    check_same_grid(prediction.geometry, reference.geometry)
    drawn, truth = _rois_by_structure(prediction, aliases), _rois_by_structure(reference, aliases)
    if not drawn.keys() & truth.keys():
        raise StudyError(
            f"no structure in common: the prediction has {_listed(prediction)}, the reference {_listed(reference)}; "
            "expected TG-263 names, or those of a table of aliases"
        )
    pairs, problems = [], {}
    for name, structure in STRUCTURES.items():
        sides = {"prediction": drawn.get(name, []), "reference": truth.get(name, [])}
        problem = _problem(sides, structure)
        if problem:
            problems[structure.tg263_name] = problem
        elif all(sides.values()):
            pairs.append(_pair(structure, drawn[name][0], truth[name][0], reference.geometry))
    return Comparison(reference.geometry, tuple(pairs), problems)


def table_lines(comparison: Comparison) -> Iterator[str]:
    """The comparison as a table: a line a structure, their means, and what was not compared."""
    titles = "  ".join(f"{title:>{_width(title)}}" for _, title, _ in COLUMNS)
    yield f"{'':<{NAME_WIDTH}}  {titles}"
    for pair in comparison.pairs:
        values = (f"{form.format(getattr(pair.agreement, key)):>{_width(title)}}" for key, title, form in COLUMNS)
        remark = OUTCOMES.get(pair.agreement.outcome, "")
        yield f"{pair.structure.tg263_name:<{NAME_WIDTH}}  {'  '.join(values)}  {remark}".rstrip()
    means = mean_agreement(comparison)
    if means:
        cells = (f"{form.format(means[key]) if key in means else '':>{_width(title)}}" for key, title, form in COLUMNS)
        yield f"{f'mean of {len(comparison.pairs)}':<{NAME_WIDTH}}  {'  '.join(cells)}".rstrip()
    for name, problem in comparison.problems.items():
        yield f"{name:<{NAME_WIDTH}}  not compared: {problem}"


def mean_agreement(comparison: Comparison) -> dict[str, float]:
    """Unweighted means over the structures; misses count with the worst value. Empty where nothing was compared."""
    if not comparison.pairs:
        return {}
    return {key: float(np.mean([getattr(pair.agreement, key) for pair in comparison.pairs])) for key in MEANS}


def write_json(path: Path, comparison: Comparison, *, overwrite: bool = False) -> None:
    """Writes every number of a comparison; nothing private.

    Raises:
        OutputError: a file that exists, or cannot be written.
    """
    outcomes = [pair.agreement.outcome for pair in comparison.pairs]
    report = {
        "anatomynet_version": version("anatomynet"),
        "shape_zyx": list(comparison.geometry.shape),
        "spacing_xyz_mm": list(comparison.geometry.spacing),
        "missed": outcomes.count("missed"),
        "invented": outcomes.count("invented"),
        "mean": mean_agreement(comparison),
        "structures": [_row(pair) for pair in comparison.pairs],
        "not_compared": comparison.problems,
    }
    write_whole(path, (json.dumps(report, indent=2) + "\n").encode(), overwrite=overwrite)


def write_csv(path: Path, comparison: Comparison, *, overwrite: bool = False) -> None:
    """Writes a line a structure, for a spreadsheet.

    Raises:
        OutputError: a file that exists, or cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, ["name", *Agreement.__dataclass_fields__])
    writer.writeheader()
    writer.writerows(_row(pair) for pair in comparison.pairs)
    write_whole(path, text.getvalue().encode(), overwrite=overwrite)


def _row(pair: ComparedRoi) -> dict[str, Any]:
    return {"name": pair.structure.tg263_name, **asdict(pair.agreement)}


def _width(title: str) -> int:
    return max(len(title), 8)


def _rois_by_structure(structure_set: StructureSet, aliases: Aliases) -> dict[str, list[Roi]]:
    """Structure name -> the ROIs that are it, the likeliest first: drawn ones, then exact names."""
    found: dict[str, list[Roi]] = {}
    for roi in structure_set.rois:
        structure = structure_from_roi_name(roi.name, aliases)
        if structure:
            found.setdefault(structure.name, []).append(roi)
    for name, rois in found.items():
        filled = [roi for roi in rois if roi.box.any()] or rois
        exact = [roi for roi in filled if roi.name in (name, STRUCTURES[name].tg263_name)]
        found[name] = exact if len(exact) == 1 else filled
    return found


def _problem(sides: dict[str, list[Roi]], structure: Structure) -> str:
    """Why a structure that someone drew cannot be compared; "" where it can, or where neither has it."""
    named = {side: rois for side, rois in sides.items() if rois}
    for side, rois in named.items():
        if len(rois) > 1:
            names = ", ".join(repr(roi.name) for roi in rois)
            return f"the {side} has {len(rois)} ROIs of that name ({names}); expected one"
        if rois[0].problem:
            return f"in the {side}, {rois[0].problem}"
    missing = sides.keys() - named.keys()
    return f"not in the {missing.pop()}" if len(missing) == 1 else ""


def _pair(structure: Structure, prediction: Roi, reference: Roi, geometry: VolumeGeometry) -> ComparedRoi:
    agreement = compare_masks(prediction.mask(geometry), reference.mask(geometry), geometry, structure=structure.name)
    return ComparedRoi(structure, prediction, reference, agreement)


def _listed(structure_set: StructureSet) -> str:
    names = [repr(name) for name in structure_set.roi_names]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "none"
