"""Structures that no patient taught the network: left out unless asked for, and then never without saying so.

ModelConfig.patients knows how many patients taught each; between choosing what to draw and drawing it.
"""

from collections.abc import Sequence

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import ModelError
from anatomynet.engine.findings import Finding
from anatomynet.engine.structures import Structure

WARNING = "no patient's contours taught the network this structure, only phantoms': its agreement with any is unknown"


def without_unvalidated(
    wanted: Sequence[Structure], model: ModelConfig
) -> tuple[tuple[Structure, ...], tuple[str, ...]]:
    """Those that patients taught, and a note on those that are left out, if any are.

    Raises:
        ModelError: none is left.
    """
    kept = tuple(structure for structure in wanted if structure.name not in model.unvalidated)
    left_out = ", ".join(structure.tg263_name for structure in wanted if structure not in kept)
    if not kept:
        raise ModelError(
            f"{left_out}: no patient's contours taught {model.name} what was asked for, and nothing else was; expected "
            "a structure that patients taught, or --allow-unvalidated"
        )
    note = f"left out: {left_out}, which no patient's contours taught {model.name}; --allow-unvalidated draws it"
    return kept, (note,) if left_out else ()


def unvalidated_findings(wanted: Sequence[Structure], model: ModelConfig) -> tuple[Finding, ...]:
    """What is to be said of those that are drawn all the same."""
    return tuple(Finding(s.tg263_name, WARNING, None) for s in wanted if s.name in model.unvalidated)
