"""Dependencies run one way, and a client does without torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1]
# What each package may import of this project, itself apart.
ALLOWED = {"engine": set[str](), "export": {"engine"}, "client": {"engine"}}
SLOW = ("torch", "scipy", "skimage", "openvino", "onnxruntime", "tritonclient")
IMPORT_EVERY_CLIENT_MODULE = """
import importlib, pkgutil, sys
import anatomynet.client
names = [module.name for module in pkgutil.walk_packages(anatomynet.client.__path__, "anatomynet.client.")]
for name in names:
    importlib.import_module(name)
print(len(names), "torch" in sys.modules)
"""
IMPORT_THE_COMMAND = """
import sys
import anatomynet.client.cli
print(*sys.modules)
"""


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def imports_of(source: Path) -> set[str]:
    """Which of engine, export and client a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in modules if name.startswith("anatomynet.")}
    return found


def test_no_client_module_imports_torch() -> None:
    count, imported = python(IMPORT_EVERY_CLIENT_MODULE).split()
    assert int(count) > 5
    assert imported == "False"


def test_the_command_starts_without_what_is_slow() -> None:
    modules = python(IMPORT_THE_COMMAND).split()
    assert [name for name in SLOW if name in modules] == []


def test_a_study_is_drawn_without_scipy() -> None:
    """To load it takes as long as to trace all contours: only what measures contours does."""
    sources = [source for package in ("engine", "client") for source in (PACKAGE / package).rglob("*.py")]
    assert [s.name for s in sources if re.search(r"(from|import) scipy", s.read_text(encoding="utf-8"))] == [
        "metrics.py"
    ]


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_dependencies_run_one_way(package: str) -> None:
    sources = sorted((PACKAGE / package).rglob("*.py"))
    assert sources
    for source in sources:
        assert imports_of(source) <= ALLOWED[package] | {package}, source
