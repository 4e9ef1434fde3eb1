"""`tritonserver`: finds the real one and runs it. Not on the path of a CT; only how a server is started.

The server on PATH is taken first, then a Triton container's own, then the one inside the nvidia-pytriton wheel.
Arguments pass through untouched, and so do signals and exit status: see anatomynet.export.keeper.
First of all the repository is checked: see anatomynet.export.manifest.
"""

import ctypes.util
import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from anatomynet.engine.errors import AnatomyNetError, ModelError, ServerError
from anatomynet.export.keeper import keep_running
from anatomynet.export.manifest import check_repository

CONTAINER_SERVER = Path("/opt/tritonserver/bin/tritonserver")
# Set for the server: a launcher that finds it was started by a launcher, through a script on PATH that hid it.
GUARD = "ANATOMYNET_TRITONSERVER_LAUNCHER"
# Scripts named tritonserver that lead to a launcher: our own console script, and version managers' shims of it.
LAUNCHER_MARKS = (b"anatomynet", b"pyenv", b"asdf", b"mise")
SNIFFED_BYTES = 4096
LOOPBACK = "127.0.0.1"
ADDRESS_OPTIONS = ("--http-address", "--grpc-address", "--metrics-address")
REPOSITORY_OPTIONS = ("--model-repository", "--model-store")
# 2000 slices of 512 x 512; Triton's own limit of 64 MiB is 128.
LARGEST_HTTP_BODY = 2**30
# gRPC's requests that are kept for the next ones, each with the memory of the largest volume that it ever held, 140 MB.
# By default eight; volumes are drawn one at a time.
KEPT_REQUESTS = {"--grpc-infer-allocation-pool-size": "1"}
# Of the Python backend.
REGIONS_OPTION, REGIONS_KEY = "--backend-config", "shm-region-prefix-name"
HELP_TIMEOUT_S = 30
# Seen on 2.51: a body called application/x-www-form-urlencoded, as curl and urllib call all that has no name, goes
# to a thread's stack, once or twice, and 8 MB of it ended the server. Address space alone, taken as it is written.
STACK_BYTES = 2 * LARGEST_HTTP_BODY + 2**24


def main() -> None:
    """Runs the real tritonserver with this command's arguments, and leaves as it leaves."""
    arguments, environment = sys.argv[1:], os.environ

    def prepare(region_prefix: str | None) -> tuple[list[str], dict[str, str]]:
        _check_repositories(arguments)
        return server_command(arguments, environment, region_prefix=region_prefix)

    try:
        if installed_server(environment) is None:
            deepen_stacks()
        keep_running(prepare)
    except AnatomyNetError as error:
        sys.stderr.write(f"tritonserver: {error}\n")
        raise SystemExit(1) from error


def deepen_stacks() -> None:
    """Of the threads of what this process starts or becomes, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    if soft == resource.RLIM_INFINITY or soft < wanted:  # without a limit glibc gives a thread 2 MiB
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))


def server_command(
    arguments: Sequence[str], environment: Mapping[str, str], *, region_prefix: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """The real server's command line and environment.

    Args:
        region_prefix: of the names of its Python models' shared memory; None is Triton's own.

    Raises:
        ServerError: no server is installed, or the wheel's cannot run in this Python.
    """
    # The server's Python backend runs the environment whose python3 is first on PATH: this one, which has anatomynet.
    path = os.pathsep.join((str(Path(sys.executable).parent), environment.get("PATH", os.defpath)))
    prepared = {**environment, "PATH": path, GUARD: str(os.getpid())}
    regions = []
    if region_prefix and not any(REGIONS_KEY in argument for argument in arguments):
        regions = [f"{REGIONS_OPTION}=python,{REGIONS_KEY}={region_prefix}"]
    server = installed_server(environment)
    if server is not None:
        known = "" if "--help" in arguments else _help_of(server)
        added = [*_options_for_volumes(known, arguments), *(regions if REGIONS_OPTION in known else [])]
        return [str(server), *added, *arguments], prepared
    command, prepared = _wheel_command(arguments, prepared)
    return [command[0], *regions, *command[1:]], prepared


def installed_server(environment: Mapping[str, str]) -> Path | None:
    """The tritonserver on PATH or of a Triton container; never a launcher, this environment's or another's."""
    candidates: list[Path] = []
    if GUARD not in environment:
        folders = environment.get("PATH", os.defpath).split(os.pathsep)
        candidates += [Path(folder) / "tritonserver" for folder in folders if folder]
    candidates.append(CONTAINER_SERVER)
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK) and not _leads_to_launcher(candidate):
            return candidate
    return None


def _leads_to_launcher(candidate: Path) -> bool:
    try:
        with candidate.open("rb") as file:
            head = file.read(SNIFFED_BYTES)
    except OSError:  # executable, but not to be read: no script
        return False
    return head.startswith(b"#!") and any(mark in head for mark in LAUNCHER_MARKS)


def _help_of(server: Path) -> str:
    """What it says of its options, best of all its version: an older one ends at an option that it does not know."""
    try:
        return subprocess.run(
            [server, "--help"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # where 2.51, for one, writes it
            text=True,
            timeout=HELP_TIMEOUT_S,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):  # it will say itself what is wrong with it
        return ""


def _options_for_volumes(known: str, arguments: Sequence[str]) -> list[str]:
    """What whole volumes need of servers that limit them, 2.59 HTTP bodies, 2.68 the clients' shared memory; and of all
    that they keep less of them.
    """
    options = {"--http-max-input-size": str(LARGEST_HTTP_BODY), **KEPT_REQUESTS}
    # Whoever may name shared memory may read the server's own: only where no other machine can ask.
    if all(set(_values(arguments, option)) == {LOOPBACK} for option in ADDRESS_OPTIONS[:2]):
        options["--allow-client-shm"] = "true"
    return [f"{name}={value}" for name, value in options.items() if name in known and not _values(arguments, name)]


def _wheel_command(arguments: Sequence[str], environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError(
            "no tritonserver on PATH, in /opt/tritonserver or in this environment: pip install 'anatomynet[serve]', "
            "or run it in a Triton container"
        )
    _check_numpy()
    home = Path(spec.origin).parent / "tritonserver"
    libraries = (str(home.parents[1] / "nvidia_pytriton.libs"), _libpython_folder(), environment.get("LD_LIBRARY_PATH"))
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    closed = {option: LOOPBACK for option in ADDRESS_OPTIONS if not _values(arguments, option)}
    if closed:
        sys.stderr.write(
            "tritonserver: the Triton 2.51 of nvidia-pytriton predates security fixes (CVE-2025-23319 and others), so "
            f"{', '.join(closed)} is {LOOPBACK} unless given\n"
        )
    options = {
        **closed,
        **KEPT_REQUESTS,
        "--backend-directory": str(_backend_directory(home, environment)),
        "--cache-directory": str(home / "caches"),
    }
    added = [f"{name}={value}" for name, value in options.items() if not _values(arguments, name)]
    return [str(home / "bin" / "tritonserver"), *added, *arguments], environment


def _check_numpy() -> None:
    version = importlib.metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:
        raise ServerError(
            f"numpy {version}: nvidia-pytriton's server answers with empty tensors under numpy 2; "
            "pip install 'anatomynet[serve]' in an environment of its own"
        )


def _libpython_folder() -> str | None:
    """The folder of this Python's shared library, which the server's Python backend needs; None for the linker's own.

    Raises:
        ServerError: a Python built without one.
    """
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    folders = [str(sysconfig.get_config_var("LIBDIR") or ""), str(Path(sys.base_prefix) / "lib")]
    for folder in folders:
        if (Path(folder) / name).is_file():
            return folder
    if ctypes.util.find_library(name.removeprefix("lib").removesuffix(".so.1.0")):
        return None
    raise ServerError(
        f"no {name} in {' or '.join(folders)}: nvidia-pytriton's server needs a Python with a shared "
        f"library (apt install {name.removesuffix('.so.1.0')}, or Python built with --enable-shared)"
    )


def _backend_directory(home: Path, environment: Mapping[str, str]) -> Path:
    """The wheel's Python backend with its stub beside it, as the server wants them: links, in a folder of our own.

    Raises:
        ServerError: a Python that the wheel has no stub for.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = home / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.is_file():
        found = ", ".join(sorted(folder.name for folder in (home / "python_backend_stubs").iterdir()))
        raise ServerError(f"nvidia-pytriton has no Python backend for Python {python}: expected one of {found}")
    files = {f"python/{file.name}": file for file in (home / "backends" / "python").iterdir() if file.is_file()}
    files["python/triton_python_backend_stub"] = stub
    key = hashlib.sha256(str(stub).encode()).hexdigest()[:12]
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "anatomynet" / f"triton-backends-{key}"
    if all(os.access(directory / name, os.R_OK) for name in files):
        return directory
    try:
        return _linked_folder(directory, files)
    except OSError:  # a home that is read-only, or not there
        return _linked_folder(Path(tempfile.mkdtemp(prefix="anatomynet-")) / directory.name, files)


def _linked_folder(directory: Path, files: Mapping[str, Path]) -> Path:
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".backends-", dir=directory.parent))
    for name, file in files.items():
        (beside / name).parent.mkdir(exist_ok=True)
        (beside / name).symlink_to(file)
    shutil.rmtree(directory, ignore_errors=True)  # of an environment that was here before
    beside.replace(directory)
    return directory


def _check_repositories(arguments: Sequence[str]) -> None:
    """Whether what is to be served is whole, ours, and can run here.

    Raises:
        ModelError: what is wrong with it, and what to do.
    """
    for repository in (value for option in REPOSITORY_OPTIONS for value in _values(arguments, option)):
        if "://" in repository:
            sys.stderr.write(f"tritonserver: {repository} is not on this machine, and was not checked\n")
        else:
            for remark in _check_without_bytecode(Path(repository)):
                sys.stderr.write(f"tritonserver: {remark}\n")


def _check_without_bytecode(repository: Path) -> list[str]:
    """`check_repository` without what a server before, or one that starts beside this, compiled of model.py.

    That is code that no manifest vouches for, soon compiled again. Where it cannot be removed, the check refuses it.
    """
    _drop_bytecode(repository)
    while True:
        try:
            return check_repository(repository)
        except ModelError:
            if not _drop_bytecode(repository):
                raise


def _drop_bytecode(repository: Path) -> bool:
    """Whether there was any, and all of it is gone."""
    folders = list(repository.glob("*/*/__pycache__"))
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return bool(folders) and not any(folder.exists() for folder in folders)


def _values(arguments: Sequence[str], option: str) -> list[str]:
    """What an option was given, as `--option VALUE` or `--option=VALUE`, or abbreviated, as the server takes it too."""
    apart = [value for name, value in itertools.pairwise(arguments) if _names(name, option)]
    joined = [argument.partition("=") for argument in arguments]
    return apart + [value for name, equals, value in joined if equals and _names(name, option)]


def _names(given: str, option: str) -> bool:
    return given.startswith("--") and len(given) > 2 and option.startswith(given)
