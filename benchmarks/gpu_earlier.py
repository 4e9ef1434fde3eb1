"""What benchmarks.gpu has of an earlier result, of the same machine: what it keeps of it, and measures first."""

from collections.abc import Collection
from typing import Any

# In the order in which they are wanted: what may be left out comes last.
PARTS = ("forms", "runtime", "labels", "served", "study", "profile", "graphs", "ONNX Runtime", "compiled")
# Parts that add rows to the table of forms, and what tells these rows.
FORMS_ELSEWHERE = {"graphs": "CUDA graph", "ONNX Runtime": "ONNX Runtime", "compiled": "torch.compile"}
HEADER = ("machine", "shape", "model", "stride", "repeats")  # of the result: what all parts have in common
BY_NAME = ("forms", "part_seconds", "not_measured", "servers", "earlier")  # what has something of several parts


def is_comparable(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two results have the same header, but for the date."""
    headers: list[dict[str, Any]] = [{key: result.get(key) for key in HEADER} for result in (before, now)]
    for header in headers:
        header["machine"] = {key: value for key, value in (header["machine"] or {}).items() if key != "date"}
    return headers[0] == headers[1]


def kept_of(before: dict[str, Any], measured: Collection[str]) -> dict[str, Any]:
    """What an earlier result has of the parts that are not measured now; under "earlier" the date of each."""
    kept = {key: value for key, value in without(before, measured).items() if key not in (*HEADER, "earlier")}
    dates = before.get("earlier", {})
    earlier = {
        part: dates.get(part, before["machine"]["date"]) for part in kept.get("part_seconds", {}) if part in PARTS
    }
    return kept | ({"earlier": earlier} if earlier else {})


def without(result: dict[str, Any], parts: Collection[str]) -> dict[str, Any]:
    """A result but for these parts. What it has of several is new, and may be added to without a change of `result`."""
    kept: dict[str, Any] = {}
    for key, value in result.items():
        if key in BY_NAME:
            kept[key] = {name: each for name, each in value.items() if part_of(name) not in parts}
        elif key in HEADER or part_of(key) not in parts:
            kept[key] = value
    return {key: value for key, value in kept.items() if value or key in HEADER}


def is_measured(result: dict[str, Any], part: str) -> bool:
    """Whether a result has all of a part."""
    failed = map(part_of, result.get("not_measured", {}))
    return part in result.get("part_seconds", {}) and part not in failed


def in_order(result: dict[str, Any], asked: Collection[str]) -> list[str]:
    """What is to be measured: these parts; where none is asked for all, first those that the result has not."""
    if asked:
        return [part for part in PARTS if part in asked]
    return sorted(PARTS, key=lambda part: is_measured(result, part))


def part_of(name: str) -> str:
    """Which part a key of the result comes from: a form's name, "form NAME", a part's own, or "served_on"."""
    if name in PARTS:
        return name
    if name == "served_on":
        return "served"
    return next((part for part, words in FORMS_ELSEWHERE.items() if words in name), "forms")
