"""A training log as a picture: loss and DSC over the steps, written beside the CSV after each epoch."""

import csv
import io
from pathlib import Path

from anatomynet.engine.output import write_whole

INCHES = (10.0, 4.0)
DOTS_PER_INCH = 100


def write_curves(log: Path) -> None:
    """Draws the CSV that training wrote, to a PNG of the same name; nothing where matplotlib is not installed.

    Raises:
        OutputError: it could not be written.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, whatever the machine has
    except ImportError:
        return
    with log.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, [row["loss"] for row in rows], marker=".", color="black")
    left.set(xlabel="step", title="training loss")
    for name in list(rows[0])[2:]:
        mean = name == "mean"
        style = {"color": "black", "linewidth": 2.5, "zorder": 3} if mean else {"linewidth": 1.0}
        right.plot(steps, [row[name] for row in rows], marker=".", label=name, **style)
    right.set(xlabel="step", title="validation DSC")  # no 0 to 1: a late epoch gains 0.01
    right.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(log.with_suffix(".png"), picture.getvalue(), overwrite=True)
