"""What benchmarks.gpu keeps of an earlier result: the parts that are not measured again, on the same machine."""

from collections.abc import Collection
from typing import Any

# In the order in which they are wanted: what may be left out comes last.
PARTS = ("forms", "runtime", "labels", "served", "study", "profile", "graphs", "ONNX Runtime", "compiled")
# Parts that add rows to the table of forms, and what tells these rows.
FORMS_ELSEWHERE = {"graphs": "CUDA graph", "ONNX Runtime": "ONNX Runtime", "compiled": "torch.compile"}
HEADER = ("machine", "shape", "model", "stride", "repeats")  # of the result: what all parts have in common
BY_NAME = ("forms", "part_seconds", "not_measured", "servers")  # and what has something of several parts


def is_comparable(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two results have the same header, but for the date."""
    headers: list[dict[str, Any]] = [{key: result.get(key) for key in HEADER} for result in (before, now)]
    for header in headers:
        header["machine"] = {key: value for key, value in (header["machine"] or {}).items() if key != "date"}
    return headers[0] == headers[1]


def kept_of(before: dict[str, Any], measured: Collection[str]) -> dict[str, Any]:
    """What an earlier result has of the parts that are not measured now; under "earlier" the date of each."""
    kept: dict[str, Any] = {}
    for key, value in before.items():
        if key in BY_NAME:
            kept[key] = {name: each for name, each in value.items() if part_of(name) not in measured}
        elif key not in (*HEADER, "earlier") and part_of(key) not in measured:
            kept[key] = value
    dates = before.get("earlier", {})
    done = [part for part in kept.get("part_seconds", {}) if part in PARTS]
    kept["earlier"] = {part: dates.get(part, before["machine"]["date"]) for part in done}
    return {key: value for key, value in kept.items() if value}


def part_of(name: str) -> str:
    """Which part a key of the result comes from: a form's name, "form NAME", a part's own, or "served_on"."""
    if name in PARTS:
        return name
    if name == "served_on":
        return "served"
    return next((part for part, words in FORMS_ELSEWHERE.items() if words in name), "forms")
