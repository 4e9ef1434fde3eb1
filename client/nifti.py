"""LabelMap -> a NIfTI label map with a table of its labels beside it: an output for research tools."""

import gzip
from pathlib import Path
from types import ModuleType

import numpy as np

from anatomynet.client.structure_table import StructureTable, load_structure_table
from anatomynet.engine.errors import OutputError
from anatomynet.engine.output import refuse_existing, write_whole
from anatomynet.engine.volume import LabelMap

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def nifti_library() -> ModuleType:
    """Nibabel.

    Raises:
        OutputError: it is not installed.
    """
    try:
        import nibabel
    except ImportError as error:
        raise OutputError("NIfTI needs nibabel: pip install 'anatomynet[formats]'") from error
    return nibabel


def label_table_path(path: Path) -> Path:
    """Of the table beside a NIfTI file: head.nii.gz -> head.labels.tsv."""
    return path.with_name(f"{path.name.removesuffix('.gz').removesuffix('.nii')}.labels.tsv")


def write_nifti(
    path: Path, label_map: LabelMap, *, table: StructureTable | None = None, overwrite: bool = False
) -> None:
    """Write a label map as NIfTI-1, uint8, and its labels as a table of index, name and colour (BIDS, "dseg.tsv").

    The file stores the array's own axes in the order (x, y, z), in RAS mm: nothing is turned or resampled. Labels of
    structures that were not found stand in the table too.

    Args:
        path: of the file, NAME.nii.gz or NAME.nii; the table is NAME.labels.tsv.
        label_map: what to write.
        table: names and colours; the catalogue's without.
        overwrite: replace files that are there.

    Raises:
        OutputError: nibabel is missing; a file that is there, a full disk, no permission.
    """
    nibabel = nifti_library()
    refuse_existing(label_table_path(path), overwrite=overwrite)
    affine = LPS_TO_RAS @ label_map.geometry.affine
    image = nibabel.Nifti1Image(np.ascontiguousarray(label_map.labels.T), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    data = image.to_bytes()
    if path.name.endswith(".gz"):
        data = gzip.compress(data, compresslevel=6, mtime=0)  # without a time: the same map, the same bytes
    write_whole(path, data, overwrite=overwrite)
    write_whole(label_table_path(path), _label_table(label_map, table), overwrite=overwrite)


def _label_table(label_map: LabelMap, table: StructureTable | None) -> bytes:
    styles = load_structure_table() if table is None else table
    rows = ["index\tname\tcolor"]
    for label, structure in enumerate(label_map.structures, start=1):
        style = styles[structure.name]
        rows.append(f"{label}\t{style.name}\t#{bytes(style.colour).hex()}")
    return ("\n".join(rows) + "\n").encode()
