"""The baseline learns by our recipe, and stands beside us in one table."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anatomynet.engine.checkpoint import load_checkpoint, save_checkpoint
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import ModelError
from benchmarks.accuracy import CAUTION
from benchmarks.baseline import DynUNetOfAnySize, table

pytest.importorskip("monai", reason="the baseline is MONAI's")

MODEL = ModelConfig("test", ("Parotid_L",), 1, (1.0, 1.0, 2.0), (2.0, 2.0, 3.0), (-250.0, 550.0))


def test_any_size_will_do() -> None:
    network = DynUNetOfAnySize(3).eval()
    with torch.inference_mode():
        for shape in ((8, 16, 16), (9, 17, 23)):
            assert network(torch.zeros(1, 1, *shape)).shape == (1, 3, *shape)


def test_it_is_monais_network() -> None:
    from monai.networks.nets.dynunet import DynUNet

    from benchmarks.baseline import FILTERS, STRIDES

    torch.manual_seed(0)
    ours = DynUNetOfAnySize(3).eval()
    torch.manual_seed(0)
    monai = DynUNet(3, 1, 3, [3] * len(STRIDES), STRIDES, STRIDES[1:], filters=FILTERS).eval()
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.inference_mode():
        assert torch.equal(ours(x), monai(x))


def test_its_weights_can_be_kept_but_are_no_anatomynet(tmp_path: Path) -> None:
    network = DynUNetOfAnySize(MODEL.classes)
    pointers = [tensor.data_ptr() for tensor in network.state_dict().values()]
    assert len(set(pointers)) == len(pointers)  # each once, or the averaged weights would follow twice as fast
    save_checkpoint(tmp_path / "baseline.safetensors", network, MODEL)
    DynUNetOfAnySize(MODEL.classes).load_state_dict(load_file(tmp_path / "baseline.safetensors"))
    with pytest.raises(ModelError, match="do not fit"):
        load_checkpoint(tmp_path / "baseline.safetensors")


def result(dice: float | None) -> dict[str, Any]:
    row = {key: {"mean": dice, "median": dice} for key in ("dice", "surface_dice", "hd95_mm")}
    return {"structures": [row | {"structure": "Parotid_L", "cases": 3}, row | {"structure": "mean", "cases": 3}]}


def test_both_stand_in_one_table() -> None:
    lines = table({"AnatomyNet": result(0.5), "DynUNet": result(None)}, MODEL)
    assert lines[1].split() == ["Parotid_L", "3", "0.500", "0.500", "0.5"]
    assert lines[-1] == CAUTION
