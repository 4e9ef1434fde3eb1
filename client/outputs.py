"""Which files `segment` writes: types and names, settled before any work is done; then their writing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from anatomynet.client.clock import StageClock
from anatomynet.client.contours import contours_of_regions, exact_tolerance_mm
from anatomynet.client.nifti import label_table_path, nifti_library, write_nifti
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.seg import seg_library, write_seg
from anatomynet.client.structure_table import StructureTable
from anatomynet.client.study import CTSeries
from anatomynet.client.study_files import named_path
from anatomynet.engine.errors import OutputError
from anatomynet.engine.findings import Finding
from anatomynet.engine.output import refuse_existing
from anatomynet.engine.structure_region import StructureRegion
from anatomynet.engine.volume import LabelMap

ENDINGS = {"rtstruct": ".rtstruct.dcm", "seg": ".seg.dcm", "nifti": ".nii.gz"}
LIBRARIES: dict[str, Callable[[], object]] = {"seg": seg_library, "nifti": nifti_library}


def output_paths(types: Sequence[str], study: Path, *, output: Path | None, overwrite: bool) -> dict[str, Path]:
    """The file of each type.

    Args:
        types: some of "rtstruct", "seg" and "nifti".
        study: files without a name of their own are called after it, beside it.
        output: of the first type; the others lie beside it, with their own endings.
        overwrite: files that are there may be replaced.

    Raises:
        OutputError: an unknown type, a package that a type needs and is missing, a file that is there, or would be two.
    """
    wanted = list(dict.fromkeys(kind.strip().lower() for kind in types))
    unknown = [kind for kind in wanted or [""] if kind not in ENDINGS]
    if unknown:
        raise OutputError(f"unknown output type {unknown[0]!r}; expected some of {', '.join(ENDINGS)}")
    for kind in wanted:
        LIBRARIES.get(kind, lambda: None)()
    first = (output or named_path(study)).absolute()
    base = first.name.removesuffix(".zip")
    if output:
        base = next((base.removesuffix(e) for e in (*ENDINGS.values(), ".nii", ".dcm") if base.endswith(e)), base)
    paths = {kind: first.with_name(base + ENDINGS[kind]) for kind in wanted}
    if output:
        other = next((kind for kind in wanted[1:] if paths[kind] == first), None)
        if other:
            raise OutputError(f"{output} would be both {wanted[0]} and {other}: give another --output")
        paths[wanted[0]] = output
    files = [*paths.values(), *([label_table_path(paths["nifti"])] if "nifti" in paths else [])]
    for path in files:
        refuse_existing(path, overwrite=overwrite)
    return paths


@dataclass(frozen=True)
class OutputStyle:
    """How results are written.

    Attributes:
        table: names, labels, colours and types.
        model_description: name, version and hash of the model.
        tolerance_mm: of thinned contours; None is as far as leaves every voxel in its structure.
        overwrite: files that are there may be replaced.
    """

    table: StructureTable
    model_description: str
    tolerance_mm: float | None = None
    overwrite: bool = False


def write_outputs(
    paths: dict[str, Path],
    series: CTSeries,
    label_map: LabelMap,
    *,
    regions: Sequence[StructureRegion],
    style: OutputStyle,
    findings: Sequence[Finding] = (),
    clock: StageClock,
) -> None:
    """Writes a drawing to the files of `output_paths`, each whole or not at all.

    Args:
        paths: type -> file.
        series: what was drawn on.
        label_map: what was drawn.
        regions: the same, cut to a box a structure.
        style: how it is written.
        findings: what deserves a look.
        clock: told the seconds of each stage.

    Raises:
        OutputError: nothing was drawn, or a file that cannot be written.
    """
    table, overwrite = style.table, style.overwrite
    if "rtstruct" in paths:
        with clock.stage("contours"):
            exact = exact_tolerance_mm(label_map.geometry)
            tolerance_mm = exact if style.tolerance_mm is None else style.tolerance_mm
            contours = contours_of_regions(regions, label_map.geometry, tolerance_mm=tolerance_mm)
        with clock.stage("write"):
            write_rtstruct(
                paths["rtstruct"],
                series,
                contours,
                notes=label_map.notes,
                findings=findings,
                model_description=style.model_description,
                table=table,
                overwrite=overwrite,
            )
    with clock.stage("write"):
        if "seg" in paths:
            write_seg(
                paths["seg"],
                series,
                label_map,
                findings=findings,
                model_description=style.model_description,
                table=table,
                overwrite=overwrite,
            )
        if "nifti" in paths:
            write_nifti(paths["nifti"], label_map, table=table, overwrite=overwrite)
