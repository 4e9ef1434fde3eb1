"""Which files `segment` writes: their types and names, settled before any work is done."""

from collections.abc import Callable
from pathlib import Path

from anatomynet.client.nifti import label_table_path, nifti_library
from anatomynet.client.seg import seg_library
from anatomynet.engine.errors import OutputError
from anatomynet.engine.output import refuse_existing

ENDINGS = {"rtstruct": ".rtstruct.dcm", "seg": ".seg.dcm", "nifti": ".nii.gz"}
LIBRARIES: dict[str, Callable[[], object]] = {"seg": seg_library, "nifti": nifti_library}


def output_paths(types: str, study: Path, *, output: Path | None, overwrite: bool) -> dict[str, Path]:
    """The file of each type.

    Args:
        types: "rtstruct", "seg" and "nifti", with commas between.
        study: files without a name of their own are called after it, beside it.
        output: of the first type; the others lie beside it, with their own endings.
        overwrite: files that are there may be replaced.

    Raises:
        OutputError: an unknown type, a package that a type needs and is missing, a file that is there.
    """
    wanted = list(dict.fromkeys(part.strip().lower() for part in types.split(",")))
    unknown = [kind for kind in wanted if kind not in ENDINGS]
    if unknown:
        raise OutputError(f"unknown output type {unknown[0]!r}; expected some of {', '.join(ENDINGS)}")
    for kind in wanted:
        LIBRARIES.get(kind, lambda: None)()
    first = (output or study).absolute()
    base = first.name.removesuffix(".zip")
    if output:
        base = next((base.removesuffix(e) for e in (*ENDINGS.values(), ".nii", ".dcm") if base.endswith(e)), base)
    paths = {kind: first.with_name(base + ENDINGS[kind]) for kind in wanted}
    if output:
        paths[wanted[0]] = output
    files = [*paths.values(), *([label_table_path(paths["nifti"])] if "nifti" in paths else [])]
    for path in files:
        refuse_existing(path, overwrite=overwrite)
    return paths
