"""export/launcher.py: which tritonserver it runs, with what; the real one's part is in test_triton.py."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.config import load_config
from anatomynet.engine.errors import ModelError, ServerError
from anatomynet.export import keeper, launcher
from anatomynet.export.keeper import Prepare
from anatomynet.export.manifest import check_repository
from anatomynet.export.repository import write_repository
from anatomynet.export.triton_models import python_model
from tests.triton_servers import LAUNCHER, has_server, running_server

needs_wheel = pytest.mark.skipif(not has_server(), reason="no tritonserver here: pip install 'anatomynet[serve]'")
SOMEONE_ELSES_SERVER = '#!/bin/sh\nfor argument; do echo "[$argument]"; done\nexit 7\n'
# What pip, uv with a long path, and pyenv put on PATH for another environment's launcher.
LAUNCHERS = {
    "pip": "#!/opt/other/bin/python3\nimport sys\nfrom anatomynet.export.launcher import main\nsys.exit(main())\n",
    "uv": "#!/bin/sh\n'''exec' '/opt/python3' \"$0\" \"$@\"\n' '''\nfrom anatomynet.export.launcher import main\n",
    "pyenv": '#!/usr/bin/env bash\nexec "/home/user/.pyenv/libexec/pyenv" exec "$program" "$@"\n',
}


def script_at(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "tritonserver"
    script.write_text(text)
    script.chmod(0o755)
    return script


def environment_with(*folders: Path, **variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(LAUNCHER.parent), *map(str, folders), "/usr/bin", "/bin"])
    return {**os.environ, "PATH": path, **variables}


def launched(*arguments: str, environment: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [LAUNCHER, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=60
    )


# --- which server


def test_runs_the_server_on_path(tmp_path: Path) -> None:
    script_at(tmp_path, SOMEONE_ELSES_SERVER)
    run = launched("--model-name=a b", "", "--id", "*", environment=environment_with(tmp_path))
    assert run.stdout.splitlines() == ["[--model-name=a b]", "[]", "[--id]", "[*]"]
    assert run.returncode == 7
    assert run.stderr == ""


def test_signals_reach_the_server(tmp_path: Path) -> None:
    script_at(tmp_path, '#!/bin/sh\n[ "$1" = --help ] && exit\necho ready\nexec sleep 60\n')
    with subprocess.Popen([LAUNCHER], stdout=subprocess.PIPE, env=environment_with(tmp_path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM


@pytest.mark.parametrize("text", LAUNCHERS.values(), ids=LAUNCHERS)
def test_never_runs_a_launcher(tmp_path: Path, text: str) -> None:
    script_at(tmp_path / "other", text)
    real = script_at(tmp_path / "real", SOMEONE_ELSES_SERVER)
    assert launcher.installed_server(environment_with(tmp_path / "other", tmp_path / "real")) == real


def test_never_runs_itself_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "tritonserver").symlink_to(LAUNCHER)
    assert launcher.installed_server(environment_with(tmp_path)) is None


def test_a_script_that_leads_back_is_followed_once(tmp_path: Path) -> None:
    script_at(tmp_path, f'#!/bin/sh\n[ "$1" = --help ] && exit\nexec {LAUNCHER} "$@"\n')
    run = launched("--model-repository=/nowhere", environment=environment_with(tmp_path))
    assert run.returncode == 1
    guarded = environment_with(tmp_path, **{launcher.GUARD: "1"})
    assert launcher.installed_server(guarded) is None


def test_passes_over_what_does_not_run(tmp_path: Path) -> None:
    script_at(tmp_path / "a", SOMEONE_ELSES_SERVER).chmod(0o644)
    (tmp_path / "b" / "tritonserver").mkdir(parents=True)
    assert launcher.installed_server(environment_with(tmp_path / "a", tmp_path / "b", tmp_path / "none")) is None


def test_takes_the_containers_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = script_at(tmp_path / "opt", SOMEONE_ELSES_SERVER)
    monkeypatch.setattr(launcher, "CONTAINER_SERVER", server)
    assert launcher.installed_server(environment_with()) == server


def test_this_environments_python_comes_first(tmp_path: Path) -> None:
    script_at(tmp_path, '#!/bin/sh\n[ "$1" = --help ] || command -v python3\n')
    assert launched(environment={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}).stdout.strip() == str(
        Path(sys.executable).with_name("python3")
    )


# --- options for whole volumes

NEWER_SERVER = (
    '#!/bin/sh\nif [ "$1" = --help ]; then echo "--http-max-input-size <n>\n--allow-client-shm <bool>"; exit; fi\n'
    'echo "$@"\n'
)


def test_whole_volumes_pass_a_newer_servers_http_limit(tmp_path: Path) -> None:
    script_at(tmp_path, NEWER_SERVER)
    run = launched("--id=x", environment=environment_with(tmp_path))
    assert run.stdout.split() == [f"--http-max-input-size={launcher.LARGEST_HTTP_BODY}", "--id=x"]


def test_a_server_keeps_the_memory_of_one_volume(tmp_path: Path) -> None:
    script_at(tmp_path, NEWER_SERVER.replace("<n>", "<n>\n--grpc-infer-allocation-pool-size <n>"))
    run = launched("--http-max-input-size=5", environment=environment_with(tmp_path))
    assert run.stdout.split() == ["--grpc-infer-allocation-pool-size=1", "--http-max-input-size=5"]
    chosen = ("--http-max-input-size=5", "--grpc-infer-allocation-pool-size=3")
    assert launched(*chosen, environment=environment_with(tmp_path)).stdout.split() == list(chosen)


def test_a_server_names_its_regions_as_it_is_told(tmp_path: Path) -> None:
    script_at(tmp_path, NEWER_SERVER.replace("<n>", "<n>\n--backend-config <b>"))
    size = "--http-max-input-size=5"
    run = launched(size, environment=environment_with(tmp_path))
    assert run.stdout.startswith(f"--backend-config=python,shm-region-prefix-name={keeper.REGION_PREFIX}")
    chosen = ["--backend-config=python,shm-region-prefix-name=mine", size]
    assert launched(*chosen, environment=environment_with(tmp_path)).stdout.split() == chosen


def test_shared_memory_only_where_no_other_machine_can_ask(tmp_path: Path) -> None:
    script_at(tmp_path, NEWER_SERVER)
    local = ("--http-address=127.0.0.1", "--grpc-address", "127.0.0.1")
    run = launched("--http-max-input-size=5", *local, environment=environment_with(tmp_path))
    assert run.stdout.split() == ["--allow-client-shm=true", "--http-max-input-size=5", *local]
    run = launched("--http-max-input-size=5", local[0], environment=environment_with(tmp_path))
    assert run.stdout.split() == ["--http-max-input-size=5", local[0]]


# --- the wheel's server


@needs_wheel
def test_the_wheels_server_listens_on_loopback_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    command, _ = launcher.server_command(["--grpc-address=0.0.0.0"], environment_with())
    assert command[1:3] == ["--http-address=127.0.0.1", "--metrics-address=127.0.0.1"]
    assert command[-1] == "--grpc-address=0.0.0.0"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "CVE" in said
    launcher.server_command([f"{name}=::" for name in launcher.ADDRESS_OPTIONS], environment_with())
    assert capsys.readouterr().err == ""


@needs_wheel
@pytest.mark.parametrize("cache", ["", "a file in the way", "gone"])
def test_the_wheel_is_not_written_to(tmp_path: Path, cache: str) -> None:
    """The backend's folder is our own: in the cache, or elsewhere where there can be none."""
    home = tmp_path / "cache"
    if cache:
        home.write_text(cache)
    command, _ = launcher.server_command([], environment_with(XDG_CACHE_HOME=str(home)))
    (option,) = [argument for argument in command if argument.startswith("--backend-directory=")]
    folder = Path(option.partition("=")[2])
    assert folder.is_relative_to(tmp_path) == (not cache)
    assert os.access(folder / "python" / "triton_python_backend_stub", os.X_OK)
    again, _ = launcher.server_command([], environment_with(XDG_CACHE_HOME=str(home)))
    assert (again == command) == (not cache)


READ_ONLY = """#!/bin/sh
exec unshare --map-root-user --mount sh -c '
for folder in {folders}; do
  mount --bind "$folder" "$folder" && mount -o remount,bind,ro "$folder" && ! [ -w "$folder" ] || exit 8
done
{become}' sh "$@"
"""


@needs_wheel
def test_the_wheel_may_be_read_only(random_repository: Path, tmp_path: Path) -> None:
    """A real start, an answer and a stop."""
    spec = importlib.util.find_spec("pytriton")
    assert spec is not None
    assert spec.origin is not None
    home = Path(spec.origin).parent
    folders = f'"{home}" "{home.with_name("nvidia_pytriton.libs")}"'
    probe = script_at(tmp_path / "probe", READ_ONLY.format(folders=folders, become="exit 0"))
    if subprocess.run([probe], capture_output=True, check=False).returncode:
        pytest.skip("a read-only folder takes a mount namespace: root may write wherever modes forbid it")
    become = f'exec "{LAUNCHER}" --model-repository="$ANATOMYNET_REPOSITORY" "$@"'
    program = script_at(tmp_path / "program", READ_ONLY.format(folders=folders, become=become))
    with (
        running_server(random_repository, folder=tmp_path, program=program) as server,  # ends by SIGTERM, status 0
        TritonRuntime(server.url) as runtime,
    ):
        assert runtime.infer(np.zeros((24, 96, 128), np.int16))[0].shape == (24, 96, 128)


@needs_wheel
def test_the_real_servers_exit_status_passes(tmp_path: Path) -> None:
    run = launched("--no-such-option")
    assert run.returncode == 1
    assert "no-such-option" in run.stderr


@needs_wheel
def test_the_real_servers_help() -> None:
    run = launched("--help", environment=environment_with())
    assert "--model-repository" in run.stdout + run.stderr


# --- what is not there


def test_no_server_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytriton", None)
    with pytest.raises(ServerError, match=r"pip install 'anatomynet\[serve\]'"):
        launcher.server_command([], environment_with())


@needs_wheel
def test_numpy_2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.1.0")
    with pytest.raises(ServerError, match=r"numpy 2\.1\.0"):
        launcher.server_command([], environment_with())


@pytest.mark.parametrize(
    "form",
    ["--model-repository={}", "--model-repository {}", "--model-store={}", "--model-repo={}", "--model-s {}"],
)
@pytest.mark.parametrize("exists", [False, True], ids=["missing", "empty"])
def test_no_repository(tmp_path: Path, form: str, exists: bool) -> None:
    repository = tmp_path / "triton_repo"
    if exists:
        repository.mkdir()
        (repository / "README.md").write_text("what lands here")
    run = launched(*form.format(repository).split(), environment=environment_with())
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "anatomynet-export --fp16" in run.stderr
    assert str(repository) in run.stderr


def test_a_repository_elsewhere_is_not_looked_for(tmp_path: Path) -> None:
    script_at(tmp_path, SOMEONE_ELSES_SERVER)
    assert launched("--model-repository=s3://bucket/models", environment=environment_with(tmp_path)).returncode == 7


def test_what_could_not_be_checked_is_told_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def start(prepare: Prepare) -> None:
        started.append(prepare(None)[0][0])

    server = script_at(tmp_path, SOMEONE_ELSES_SERVER)
    monkeypatch.setattr(sys, "argv", ["tritonserver", f"--model-repository={tmp_path}"])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(launcher, "check_repository", lambda repository: [f"{repository} could not be checked"])
    monkeypatch.setattr(launcher, "keep_running", start)
    launcher.main()
    assert started == [str(server)]
    assert capsys.readouterr().err == f"tritonserver: {tmp_path} could not be checked\n"


@pytest.mark.parametrize("removable", [True, False])
def test_what_another_server_compiles_during_the_check_is_dropped_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removable: bool
) -> None:
    """Two servers that start on one repository: the check of the second took that for foreign code."""
    onnx_file, compiled = tmp_path / "network.onnx", tmp_path / "repo" / "anatomynet" / "1" / "__pycache__"
    onnx_file.write_bytes(b"the network")
    write_repository(tmp_path / "repo", [python_model(load_config("openkbp7")[0], [onnx_file])])
    loads = ["another server's"]

    def check(repository: Path) -> list[str]:
        if loads:
            loads.clear()
            compiled.mkdir()
            (compiled / "model.cpython-311.pyc").write_bytes(b"code")
        return check_repository(repository)

    monkeypatch.setattr(launcher, "check_repository", check)
    if removable:
        launcher._check_repositories([f"--model-repository={tmp_path / 'repo'}"])
        assert not compiled.exists()
    else:
        monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
        with pytest.raises(ModelError, match=r"\.pyc is not what anatomynet-export wrote"):
            launcher._check_repositories([f"--model-repository={tmp_path / 'repo'}"])
