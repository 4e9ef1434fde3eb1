"""The manifest of a model's folder: the sha256 of every file, held against the files before a server starts.

`anatomynet-export` writes it; the launcher checks the whole repository by it, and model.py its own folder, where a
server was started without the launcher. It finds what was damaged, lost, added or changed, and what cannot run here;
and no code but this package's own model.py is let through.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from anatomynet import __version__
from anatomynet.engine.contract import MODEL_NAME
from anatomynet.engine.errors import ModelError
from anatomynet.export.gpu import tensorrt_versions, visible_gpus
from anatomynet.export.triton_models import MODEL_SOURCE, shipped_model_source

MANIFEST_NAME = "manifest.json"
# A backend's name can stand for a library in the model's own folder, so no other kind of file is served.
SERVED_SUFFIXES = (".onnx", ".plan", ".safetensors")
CONFIG_NAME = "config.pbtxt"
KEYS = {"anatomynet_version", "needs", "plan", "sha256"}
PLAN_KEYS = ("tensorrt_version", "compute_capability", "gpu")
# In place of these, of a plan for RTX workstations.
RTX_VERSION_KEY = "tensorrt_rtx_version"
KEYS_OF_PLANS = (PLAN_KEYS, (RTX_VERSION_KEY,))
EXPORT_AGAIN = "write it anew with `anatomynet-export`"
REBUILD = "build it on this machine, with `anatomynet-export --fp16 --backend tensorrt`"
OTHER_BACKEND = "serve it on the machine it was built for, or export with `--backend python`"


def write_manifest(folder: Path, *, needs: Sequence[str] = (), plan: Mapping[str, str] | None = None) -> None:
    """Hashes all that lies in a model's folder, and writes it down there.

    Args:
        needs: models of the same repository that this one calls.
        plan: what alone can run its plan, PLAN_KEYS; or RTX_VERSION_KEY and what else there is to know of it.
    """
    manifest = {"anatomynet_version": __version__, "needs": list(needs), "plan": plan, "sha256": _hashes(folder)}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def check_repository(repository: Path) -> list[str]:
    """Whether every model in a repository is whole, ours, and can run here, and none is missing that another calls.

    Returns:
        What could not be found out, a line each.

    Raises:
        ModelError: no model `anatomynet`, one that anatomynet-export did not write, or that cannot be read or run here.
    """
    try:
        return _checked(repository)
    except OSError as error:
        raise ModelError(
            f"{error.filename} cannot be read: {error.strerror}; if an export to {repository} has just replaced it, "
            "start the server again"
        ) from error


def _checked(repository: Path) -> list[str]:
    folders = sorted(path for path in repository.iterdir() if path.is_dir()) if repository.is_dir() else []
    if not folders:
        found = "an empty one" if repository.is_dir() else "no such folder"
        raise ModelError(f"no model in {repository}: {found}; write one with `anatomynet-export --fp16`")
    if not (repository / MODEL_NAME).is_dir():
        raise ModelError(
            f"no model {MODEL_NAME} in {repository}, only {', '.join(folder.name for folder in folders)}: an export "
            f"may have been ended in the middle; {EXPORT_AGAIN}"
        )
    remarks = []
    for folder in folders:
        check_files(folder)
        _check_nothing_added(folder)
        _check_code(folder)
        for needed in read_manifest(folder)["needs"]:
            if not (repository / needed).is_dir():
                raise ModelError(f"no model {needed} in {repository}, which {folder.name} calls: {EXPORT_AGAIN}")
        remarks += _check_plan(folder)
    return remarks


def check_files(folder: Path) -> None:
    """Whether every file of a model's manifest is there, as it was written.

    Raises:
        ModelError: no manifest, or a file that is missing or changed.
    """
    for name, expected in read_manifest(folder)["sha256"].items():
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing, {MANIFEST_NAME} lists it: {EXPORT_AGAIN}")
        if _sha256(folder / name) != expected:
            raise ModelError(
                f"{folder / name} is damaged or was changed: its sha256 is not that of {MANIFEST_NAME}; {EXPORT_AGAIN}"
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a model's folder.

    Raises:
        ModelError: there is none, or it is none.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} has no {MANIFEST_NAME}: expected a model that this package's anatomynet-export wrote, and "
            f"nothing else in the repository; {EXPORT_AGAIN}, or move the folder elsewhere"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({type(error).__name__}): {EXPORT_AGAIN}") from error
    if not _is_manifest(manifest):
        raise ModelError(
            f"{path} is no manifest: expected {', '.join(sorted(KEYS))}, of a plan {', '.join(PLAN_KEYS)}; "
            f"{EXPORT_AGAIN}"
        )
    return manifest


def _is_manifest(found: Any) -> TypeGuard[dict[str, Any]]:
    if not isinstance(found, dict) or not KEYS.issubset(found):
        return False
    plan, needs = found["plan"], found["needs"]
    return (
        isinstance(found["sha256"], dict)
        and isinstance(needs, list)
        and all(isinstance(name, str) for name in needs)
        and (plan is None or (isinstance(plan, dict) and any(_has_strings(plan, keys) for keys in KEYS_OF_PLANS)))
    )


def _has_strings(found: dict[str, Any], keys: Sequence[str]) -> bool:
    return all(isinstance(found.get(key), str) for key in keys)


def _check_nothing_added(folder: Path) -> None:
    listed = set(read_manifest(folder)["sha256"]) | {MANIFEST_NAME}
    added = sorted(name for name in _files(folder) if name not in listed or not _may_be_served(name))
    if added:
        raise ModelError(
            f"{folder / added[0]} is not what anatomynet-export wrote: expected only config.pbtxt, {MODEL_SOURCE}, "
            f"ONNX files, checkpoints and plans that {MANIFEST_NAME} lists; remove it"
        )


def _check_code(folder: Path) -> None:
    ours = {_sha256(source) for source in shipped_model_source().parent.glob("*.py")}
    for name in _files(folder):
        if PurePosixPath(name).name == MODEL_SOURCE and _sha256(folder / name) not in ours:
            raise ModelError(
                f"{folder / name} is not that of the installed anatomynet {__version__} (it was written by "
                f"{read_manifest(folder)['anatomynet_version']}), and no other code is run: {EXPORT_AGAIN}"
            )


def _check_plan(folder: Path) -> list[str]:
    """Returns what could not be found out; raises ModelError where a plan cannot run here."""
    plan = read_manifest(folder)["plan"]
    if plan is None:
        return []
    if RTX_VERSION_KEY in plan:
        raise ModelError(
            f"{folder} holds a plan of TensorRT-RTX {plan[RTX_VERSION_KEY]}, which no Triton backend loads: move it "
            "out of the repository"
        )
    _check_gpus(folder, plan)
    return _check_tensorrt(folder, plan["tensorrt_version"])


def _check_gpus(folder: Path, plan: Mapping[str, str]) -> None:
    gpus = visible_gpus()
    if not gpus:
        raise ModelError(f"{folder} holds a TensorRT plan, and no NVIDIA GPU is here: {OTHER_BACKEND}")
    for gpu in gpus:
        if gpu.compute_capability != plan["compute_capability"]:
            raise ModelError(
                f"{folder} holds a TensorRT plan for compute capability {plan['compute_capability']}, found "
                f"{gpu.compute_capability} ({gpu.name}): {REBUILD}"
            )
        # Refused, though TensorRT loads it: it warns of errors and deadlock, not of lost speed alone, unless a plan
        # was built to run on other products of a compute capability, slower. Nor was this one proven there.
        if gpu.name != plan["gpu"]:
            raise ModelError(
                f"{folder} holds a TensorRT plan built on {plan['gpu']}, found {gpu.name}, on which it may fail though "
                f"both have compute capability {gpu.compute_capability}: {REBUILD}"
            )


def _check_tensorrt(folder: Path, built_by: str) -> list[str]:
    found = [".".join(map(str, version)) for version in tensorrt_versions()]
    if not found:
        # Not refused: TensorRT does that itself as it loads the plan, and a server may know where else to look.
        return [
            f"{folder} holds a plan of TensorRT {built_by}, which no other version loads, and no libnvinfer was found "
            "to tell which is here: the server will"
        ]
    if ".".join(built_by.split(".")[:3]) not in found:
        raise ModelError(
            f"{folder} holds a plan of TensorRT {built_by}, found {' and '.join(found)}, which cannot read it: "
            f"{REBUILD}"
        )
    return []


def _may_be_served(name: str) -> bool:
    file = PurePosixPath(name)
    return name in (CONFIG_NAME, MANIFEST_NAME) or file.name == MODEL_SOURCE or file.suffix in SERVED_SUFFIXES


def _hashes(folder: Path) -> dict[str, str]:
    return {name: _sha256(folder / name) for name in _files(folder)}


def _files(folder: Path) -> list[str]:
    # As a server sees it: through links to folders, of which Kubernetes makes many.
    found = (Path(home) / name for home, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
