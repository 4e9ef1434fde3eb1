"""The log becomes a picture, also one of a single epoch, and with a structure that no case has."""

from pathlib import Path

import pytest

from anatomynet.engine.curves import DOTS_PER_INCH, INCHES, write_curves

pytest.importorskip("matplotlib", reason="curves are drawn where matplotlib is installed")

HEADER = "step,loss,mean,Larynx,Chiasm\n"


@pytest.mark.parametrize("rows", ["250,1.9,0.4,0.4,nan\n", "250,1.9,0.4,0.4,nan\n500,1.2,0.6,0.6,nan\n"])
def test_the_log_becomes_a_picture(tmp_path: Path, rows: str) -> None:
    from matplotlib.image import imread

    log = tmp_path / "run.csv"
    log.write_text(HEADER + rows)
    write_curves(log)
    picture = imread(tmp_path / "run.png")
    assert picture.shape[:2] == (INCHES[1] * DOTS_PER_INCH, INCHES[0] * DOTS_PER_INCH)
    assert picture[..., :3].std() > 0.02  # something is drawn
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.csv", "run.png"]


def test_another_loss_is_another_picture(tmp_path: Path) -> None:
    pictures = []
    for loss in (1.9, 0.9):
        (tmp_path / "run.csv").write_text(f"{HEADER}250,2.0,0.4,0.4,nan\n500,{loss},0.6,0.6,nan\n")
        write_curves(tmp_path / "run.csv")
        pictures.append((tmp_path / "run.png").read_bytes())
    assert pictures[0] != pictures[1]
