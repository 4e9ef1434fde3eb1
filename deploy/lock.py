"""Pins every package that anatomynet[dev] brings, directly or not: `make lock` writes it down as requirements.lock.

    python deploy/lock.py > requirements.lock

constraints.txt says which versions were chosen; this, what they were tried with. One platform: Linux, Python 3.11.
"""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
OWN_NAME = "anatomynet"
# Left out: `tensorrt`, whose libraries lie outside the package index.
EXTRAS = ("dev",)
HEAD = """# Every package of anatomynet[dev] with the version it was tried with, on Linux and Python 3.11.
# Written by `make lock`; the chosen ones stand in constraints.txt.
"""

Asked = tuple[str, frozenset[str]]


def locked_versions() -> dict[str, str]:
    """Name and version, without a local part like +cpu, of all that is installed here for the project.

    Raises:
        PackageNotFoundError: something that the project asks for is not installed.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [Requirement(text) for text in project["dependencies"]]
    waiting += [Requirement(f"{OWN_NAME}[{','.join(EXTRAS)}]")]
    versions: dict[str, str] = {}
    seen: set[Asked] = set()
    while waiting:
        asked = waiting.pop()
        name, extras = canonicalize_name(asked.name), frozenset(asked.extras)
        if (name, extras) in seen or (asked.marker and not asked.marker.evaluate({"extra": ""})):
            continue
        seen.add((name, extras))
        if name == OWN_NAME:
            texts = (text for extra in extras for text in project["optional-dependencies"][extra])
            waiting += [Requirement(text) for text in texts]
        else:
            versions[name] = Version(distribution(name).version).public
            waiting += needed_by(name, extras)
    return dict(sorted(versions.items()))


def needed_by(name: str, extras: frozenset[str]) -> list[Requirement]:
    """What an installed package requires here, with these of its extras."""
    requirements = [Requirement(text) for text in distribution(name).requires or ()]
    kinds = ("", *extras)
    return [
        Requirement(str(r).split(";")[0])
        for r in requirements
        if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in kinds)
    ]


if __name__ == "__main__":
    try:
        lines = [f"{name}=={version}\n" for name, version in locked_versions().items()]
    except PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install -c constraints.txt '.[dev]' first") from error
    sys.stdout.write(HEAD + "".join(lines))
