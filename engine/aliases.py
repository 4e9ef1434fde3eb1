"""Which structure an ROI is, from what a department calls it: "LT PAROTID" -> Parotid_L.

Two names are the same when their letters and digits are, whatever the capitals and accents, and their side, wherever
it stands and however it is spelt. Nothing more is guessed: with a word more ("Parotid_L_PRV") it is another ROI, and
so it is with one of TG-263's marks ("SpinalCord~").
"""

import re
import tomllib
import unicodedata
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from anatomynet.engine.errors import ModelError
from anatomynet.engine.structures import STRUCTURES, Structure

# English, German and French; a lone letter where it stands apart or before a capital.
SIDES = {
    **dict.fromkeys(("l", "lt", "lft", "left", "li", "links", "linke", "sin", "gauche"), "L"),
    **dict.fromkeys(("r", "rt", "rgt", "right", "re", "rechts", "rechte", "dex", "droite"), "R"),
}
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+|\d+")
# TG-263: "~" marks a structure contoured in part, "^" a department's own variant, "_" in front a help for planning.
MARKS = re.compile(r"[~^]|^_")

NameKey = tuple[str, str]  # marks, then letters and digits without the side, small; "L", "R" or ""
Aliases = Mapping[NameKey, Structure]


def load_aliases(path: Path | None = None) -> Aliases:
    """The shipped table of ROI names, the structures' own names, and a department's file, which wins.

    Args:
        path: a TOML file, each key a structure's name, or a pair's without its side, with a list of ROI names.

    Raises:
        ModelError: a file that is not there or not TOML, an unknown structure, or one name for two structures.
    """
    shipped = resources.files("anatomynet.engine") / "configs" / "aliases.toml"
    own = {_name_key(name): s for s in STRUCTURES.values() for name in (s.name, s.tg263_name)}
    aliases = own | _aliases_from_toml(shipped.read_text(encoding="utf-8"), shipped.name)
    if path is None:
        return aliases
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: expected a TOML table of ROI names") from error
    return aliases | _aliases_from_toml(text, path.name)


def structure_from_roi_name(name: str, aliases: Aliases | None = None) -> Structure | None:
    """The structure that an ROI of this name is; None where it is none of ours.

    Args:
        name: as the department writes it.
        aliases: what `load_aliases` gave; the shipped table without.
    """
    return (load_aliases() if aliases is None else aliases).get(_name_key(name))


def _name_key(name: str) -> NameKey:
    """Lt Sub-Mandibular -> ("submandibular", "L"); two sides are none."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    words = [word.casefold() for word in WORD.findall(plain)]
    sides = [word for word in words if word in SIDES]
    named = words if len(sides) != 1 else [word for word in words if word not in SIDES]
    marks = MARKS.findall(plain.strip()) if named else []
    return "".join((*marks, *named)), SIDES[sides[0]] if len(sides) == 1 else ""


def _aliases_from_toml(text: str, source: str) -> dict[NameKey, Structure]:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ModelError(f"{source} is not TOML: {error}") from error
    aliases: dict[NameKey, Structure] = {}
    for key, names in table.items():
        for name in _checked_names(names, key, source):
            words, named_side = _name_key(name)
            if not words:
                raise ModelError(f"{source}: {name!r} is no name of {key}: expected letters or digits besides its side")
            for side, structure in _structures_of(key, source):
                if side and named_side and side != named_side:
                    continue  # of a pair, the name is the other one's
                if structure.mirror and named_side and not structure.name.endswith(f"_{named_side}"):
                    raise ModelError(f"{source}: {name!r} is the other side of {structure.name}: expected its own")
                known = aliases.setdefault((words, side or named_side), structure)
                if known is not structure:
                    raise ModelError(f"{source}: {name!r} stands for {known.name} and {structure.name}: expected one")
    return aliases


def _checked_names(names: Any, key: str, source: str) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{source}: {key} is {names!r}; expected a list of ROI names")
    return names


def _structures_of(key: str, source: str) -> list[tuple[str, Structure]]:
    """The structure of a key, or both of a pair with their sides."""
    if key in STRUCTURES:
        return [("", STRUCTURES[key])]
    pair = [(side, STRUCTURES[f"{key}_{side}"]) for side in "LR" if f"{key}_{side}" in STRUCTURES]
    if not pair:
        raise ModelError(f"{source}: unknown structure {key}; expected one of {', '.join(STRUCTURES)}")
    return pair
