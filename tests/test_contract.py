"""engine/contract.py: the names that every client knows, as its docstring and triton_repo/README.md have them."""

import re
from pathlib import Path

from anatomynet.engine import contract

README = Path(__file__).parents[1] / "triton_repo" / "README.md"
SERVED = [("CT", "INT16", "[z, y, x]"), ("LABEL_MAP", "UINT8", "[z, y, x]"), ("CONFIDENCE", "FP32", "[n]")]
REGION = [("CT_COARSE", "INT16", "[z, y, x]"), ("BOX", "INT64", "[6]")]


def test_the_names_are_those_that_clients_know() -> None:
    assert (contract.MODEL_NAME, contract.REGION_NAME) == ("anatomynet", "anatomynet_region")
    assert (contract.CT, contract.LABEL_MAP, contract.CONFIDENCE) == ("CT", "LABEL_MAP", "CONFIDENCE")
    assert (contract.CT_COARSE, contract.BOX) == ("CT_COARSE", "BOX")


def test_the_keys_are_those_of_files_that_were_written() -> None:
    assert (contract.CONFIG_KEY, contract.REGION_CONFIG_KEY) == ("model_config", "region_config")
    assert (contract.METADATA_KEY, contract.REGION_METADATA_KEY) == ("anatomynet", "anatomynet_region")


def test_the_docstring_tells_of_the_same_tensors() -> None:
    told = re.findall(r"(\w+) +((?:U?INT|FP)\d+) +(\[[^]]+\])", contract.__doc__ or "")
    assert told == SERVED + REGION


def test_the_readme_tells_of_the_same_tensors() -> None:
    text = README.read_text(encoding="utf-8")
    assert re.findall(r"^\| (?:in|out)put \| `(\w+)` \| (\w+) \| (\[.+?\]) \|", text, re.MULTILINE) == SERVED
    (line,) = re.findall(r"^ +anatomynet_region/ .*", text, re.MULTILINE)
    assert re.findall(r"`(\w+)`, (\w+) (\[.+?\])", line) == REGION
