"""What SECURITY.md promises of the sources and of what they are made of; of a server: test_deploy.py."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions, metadata
from pathlib import Path
from typing import Any

import pytest

packaging_requirements = pytest.importorskip("packaging.requirements")
canonicalize_name = pytest.importorskip("packaging.utils").canonicalize_name
Version = pytest.importorskip("packaging.version").Version

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for folder in ("engine", "export", "client") for path in (ROOT / folder).rglob("*.py"))
# Modules that make objects, and so run code, of what they read.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS = {"os.system", "os.popen", "tempfile.mktemp", "yaml.load", "yaml.unsafe_load", "torch.hub.load"}
# A plan for a GPU, whose package is not on every index.
NOT_LOCKED = {"tensorrt"}
# What an environment has by itself, this project, and a GPU's compilers, of .ci/run or of a PyTorch for CUDA.
COMPILERS = {"triton", "cuda-bindings", "cuda-pathfinder", "nvidia-cuda-nvrtc"}
NOT_ASKED_FOR = {"anatomynet", "pip", "wheel"} | COMPILERS
GPU_LOCK = ROOT / "deploy" / "container" / "requirements-gpu.lock"


def unsafe(source: str) -> list[str]:
    """What in a module could run code that came as data, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: {a.name}" for a in node.names if a.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            found.append(f"{node.lineno}: {node.module}")
        elif isinstance(node, ast.Call) and is_unsafe_call(node):
            found.append(f"{node.lineno}: {ast.unparse(node.func)}")
    return found


def is_unsafe_call(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    given = {k.arg: ast.unparse(k.value) for k in call.keywords}
    return (
        name in UNSAFE_BUILTINS | UNSAFE_CALLS
        or (name == "torch.load" and given.get("weights_only") != "True")
        or given.get("allow_pickle", "False") != "False"
        or given.get("shell", "False") != "False"
        or given.get("trust_remote_code", "False") != "False"
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_code_comes_as_data(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "yaml.load(text)",
    ],
)
def test_it_would_be_found(line: str) -> None:
    assert len(unsafe(f"def f(text, path):\n    {line}\n")) == 1


@pytest.mark.parametrize("line", ["model.eval()", "torch.load(path, weights_only=True)", "np.load(path)"])
def test_what_is_harmless_passes(line: str) -> None:
    assert unsafe(line) == []


# --- what it is made of


def pinned(path: Path) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    pairs = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if line]
    assert all(pairs), f"{path.name}: expected NAME==VERSION on each line"
    return {canonicalize_name(pair[1]): pair[2] for pair in pairs if pair}


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    return pinned(ROOT / "requirements.lock")


def test_lock_and_constraints_agree(locked: dict[str, str]) -> None:
    chosen = pinned(ROOT / "constraints.txt")
    assert {name: locked.get(name) for name in chosen} == chosen


def test_what_a_gpu_has_besides_is_locked_once(locked: dict[str, str]) -> None:
    """And it has the very compilers by which the tests compile its kernels."""
    besides = pinned(GPU_LOCK)
    assert besides.keys().isdisjoint(locked)
    assert besides.keys() >= COMPILERS
    constraint = str(GPU_LOCK.relative_to(ROOT))
    install = (ROOT / ".ci" / "run").read_text().partition(f"--constraint {constraint}")[2].splitlines()[0]
    assert COMPILERS - {"cuda-pathfinder"} == set(install.split())


def test_lock_holds_what_the_project_asks_for(locked: dict[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(t for extra in project["optional-dependencies"].values() for t in extra)]
    for requirement in map(packaging_requirements.Requirement, texts):
        name = canonicalize_name(requirement.name)
        if name not in NOT_LOCKED | {"anatomynet"}:
            assert name in locked, f"{name} is not locked: make lock"
            assert requirement.specifier.contains(locked[name]), f"{name} {locked[name]}: make lock"


def test_lock_holds_what_these_bring_along(locked: dict[str, str]) -> None:
    """A package that a change brought here, and that nobody locked, is found."""
    run = subprocess.run([sys.executable, ROOT / "deploy" / "lock.py"], capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip(run.stderr.strip())
    here = {line.split("==")[0] for line in run.stdout.splitlines() if "==" in line}
    assert sorted(here - set(locked)) == [], "run: make lock"


def test_what_is_installed_is_what_is_locked(locked: dict[str, str]) -> None:
    """In CI: a developer may try another version."""
    here = {canonicalize_name(d.metadata["Name"]): Version(d.version).public for d in distributions()}
    unlocked = {name: version for name, version in here.items() if name not in NOT_ASKED_FOR | locked.keys()}
    other = {name: version for name, version in here.items() if version != locked.get(name, version)}
    if (unlocked or other) and not os.environ.get("CI"):
        pytest.skip(f"installed by hand: {unlocked | other}")
    assert (unlocked, other) == ({}, {})


@pytest.fixture(scope="module")
def bill(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `make sbom` writes. It also proves that each URL is one by its grammar, which takes most of a minute."""
    program = Path(sys.executable).with_name("cyclonedx-py")
    if not program.exists():
        pytest.skip("no cyclonedx-py here: pip install cyclonedx-bom")
    output = tmp_path_factory.mktemp("sbom") / "sbom.json"
    recipe = (ROOT / "Makefile").read_text().partition("\nsbom:")[2].split("\n\n")[0]
    options = recipe.partition("cyclonedx-py environment")[2].replace("\\\n", " ").split()
    options[options.index("-o") + 1] = str(output)
    assert options[-1] == "$(BIN)/python"
    command: list[str | Path] = [program, "environment", "--no-validate", *options[:-1], sys.executable]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_bill_of_materials_names_all_that_is_locked(locked: dict[str, str], bill: dict[str, Any]) -> None:
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "anatomynet"
    assert set(locked) <= {canonicalize_name(component["name"]) for component in bill["components"]}


# --- what may be installed: deploy/packages.toml


@pytest.fixture(scope="module")
def judged() -> dict[str, Any]:
    return tomllib.loads((ROOT / "deploy" / "packages.toml").read_text())


def unaccepted(component: dict[str, Any], accepted: set[str], classifiers: set[str]) -> list[str]:
    """Licences of a component that are not accepted; of alternatives one is enough."""
    refused = []
    for licence in component.get("licenses", []):
        text = licence.get("expression") or licence["license"].get("id") or licence["license"]["name"]
        if text in classifiers:
            continue
        choices = [set(choice.strip("() ").split(" AND ")) for choice in text.split(" OR ")]
        if not any(choice <= accepted for choice in choices):
            refused.append(text)
    return refused


def test_every_licence_is_accepted(bill: dict[str, Any], judged: dict[str, Any]) -> None:
    licences = judged["licences"]
    accepted, classifiers = set(licences["accepted"]), set(licences["accepted_classifiers"])
    refused = {}
    for component in bill["components"]:
        name = canonicalize_name(component["name"])
        if name in licences["exceptions"]:
            continue
        if not component.get("licenses"):
            said = metadata(name)["License"]
            if said != licences["own_words"].get(name, ""):
                refused[name] = [said]
        elif wrong := unaccepted(component, accepted, classifiers):
            refused[name] = wrong
    assert refused == {}, "look at these licences, then change the package or deploy/packages.toml"


@pytest.mark.parametrize("text", ["GPL-3.0-only", "MIT AND AGPL-3.0-only", "GPL-2.0-only OR SSPL-1.0"])
def test_a_licence_that_binds_would_be_found(judged: dict[str, Any], text: str) -> None:
    component = {"name": "x", "licenses": [{"expression": text}]}
    assert unaccepted(component, set(judged["licences"]["accepted"]), set()) == [text]


def weak(versions: dict[str, str], judged: dict[str, Any]) -> dict[str, list[str]]:
    """Packages of a version with a known weakness, and its names."""
    mended = judged["mended"]
    return {
        name: mended[name]["cve"]
        for name, version in versions.items()
        if name in mended and Version(version) < Version(mended[name]["version"])
    }


def test_nothing_locked_has_a_weakness_that_is_known_here(locked: dict[str, str], judged: dict[str, Any]) -> None:
    assert judged["mended"].keys() <= locked.keys(), "no longer locked: take it out of deploy/packages.toml"
    assert weak(locked, judged) == {}


def test_a_weakness_would_be_found(locked: dict[str, str], judged: dict[str, Any]) -> None:
    assert weak(locked | {"torch": "2.5.1"}, judged) == {"torch": judged["mended"]["torch"]["cve"]}
    for name, entry in judged["mended"].items():
        assert entry["cve"], name
        assert all(re.fullmatch(r"CVE-\d{4}-\d{4,}", cve) for cve in entry["cve"]), name


def test_what_is_weak_or_not_open_is_optional_and_in_no_image(judged: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    shipped = [*project["dependencies"], *extras["local"], *extras["gpu"]]
    recipe = (ROOT / "deploy" / "container" / "Containerfile").read_text().replace("\\\n", "")
    on_cpu, on_gpu = re.findall(r"pip install --no-cache-dir ([^&\n]+)", recipe)
    assert on_cpu == "-c constraints.txt -c requirements.lock '.[local]'"
    assert on_gpu.split() == [*on_cpu.split()[:-1], "-c", GPU_LOCK.name, "'.[local,gpu]'"]
    names = {canonicalize_name(packaging_requirements.Requirement(text).name) for text in shipped}
    assert names.isdisjoint(judged["weak"].keys() | judged["licences"]["exceptions"].keys())
