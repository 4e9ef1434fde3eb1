"""The Triton model repository: folders of models that any client can call. Last step of `anatomynet-export`.

    OUTPUT/anatomynet/config.pbtxt      the contract, the ModelConfig, queue limits, warm-up
    OUTPUT/anatomynet/manifest.json     the sha256 of every file
    OUTPUT/anatomynet/1/...             what its backend runs: see export.triton_models
    OUTPUT/anatomynet_region            beside it, the region finder, where it knows the structures
    OUTPUT/anatomynet_prepare, _plan, _finish     beside it, with `--backend tensorrt`

Written beside and swapped in, so that a server never finds half a model.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from anatomynet.engine.contract import MODEL_NAME, REGION_NAME
from anatomynet.engine.errors import ExportError
from anatomynet.engine.output import alone_in
from anatomynet.engine.stops import temporary_folder
from anatomynet.export.manifest import CONFIG_NAME, write_manifest
from anatomynet.export.triton_models import FINISH_NAME, PLAN_NAME, PREPARE_NAME, TritonModel

# Of whatever backend: a new variant takes the place of the old one, and of all its parts.
VARIANT_NAMES = (MODEL_NAME, PREPARE_NAME, PLAN_NAME, FINISH_NAME, REGION_NAME)


def write_repository(output: Path, models: Sequence[TritonModel]) -> None:
    """Fills a Triton model repository; models of an older export go, whatever else lies in `output` stays.

    Args:
        output: the repository's folder, made where it is missing.
        models: all that belong together, of one backend.

    Raises:
        ExportError: a file that is missing, or a folder that cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with temporary_folder(prefix=f".{MODEL_NAME}-", dir=_folder_beside(output)) as beside:
            new, old = Path(beside) / "new", Path(beside) / "old"
            old.mkdir()
            for model in models:
                _write_model(new / model.name, model)
            with alone_in(output):  # two exports that swap at once would leave models of both
                _swap_in(new, output, old)
    except OSError as error:
        # Of a copy that fails both are named, and the second is the one that could not be written.
        place = error.filename2 or error.filename or output
        raise ExportError(f"could not write {output}: {error.strerror}: {place}") from error


def _write_model(folder: Path, model: TritonModel) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    (folder / CONFIG_NAME).write_text(model.config_text, encoding="utf-8")
    for name, file in model.files.items():
        shutil.copyfile(file, version / name)
    write_manifest(folder, needs=model.needs, plan=model.plan.requirements if model.plan else None)


def _folder_beside(output: Path) -> Path:
    """Where a model can be written and then moved to `output` by a rename.

    Beside the repository: a server takes every folder inside for a model, and fails on half of one. Inside where it
    must be: where the repository is a mount of its own, or the folder around it belongs to someone else.
    """
    around = output.absolute().parent
    same_file_system = around.stat().st_dev == output.stat().st_dev
    return around if same_file_system and os.access(around, os.W_OK) else output


def _swap_in(new: Path, output: Path, old: Path) -> None:
    """Renames alone; the old models come back where one fails, and go with their folder where none does."""
    # The one that clients ask for comes last: its parts are there before it is.
    names = sorted((folder.name for folder in new.iterdir()), key=lambda name: name == MODEL_NAME)
    replaced = [name for name in dict.fromkeys((*VARIANT_NAMES, *names)) if (output / name).exists()]
    moves = [(output / name, old / name) for name in replaced] + [(new / name, output / name) for name in names]
    begun: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            begun.append((source, target))
            source.rename(target)
    except BaseException:  # Ctrl-C too: the folder of the old and the new is about to go
        for source, target in reversed(begun):
            if not source.exists():
                target.rename(source)
        raise
