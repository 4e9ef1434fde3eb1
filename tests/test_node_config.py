"""A node's settings: what a site may write, and the one line that says what it may not."""

from pathlib import Path

import pytest

from anatomynet.client.node_config import load_node_config
from anatomynet.engine.errors import NodeError

LEAST = 'ae_title = "ANATOMYNET"\nport = 11112\nspool = "spool"\n'
PEER = '[[peer]]\nae_title = "CT_SIM"\naddress = "10.1.2.0/24"\n'
DESTINATION = '[[destination]]\nname = "planning"\nae_title = "TPS"\nhost = "10.1.2.9"\nport = 104\n'


def load(folder: Path, text: str) -> object:
    (folder / "node.toml").write_text(text)
    return load_node_config(folder / "node.toml")


def test_settings_and_defaults(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text(LEAST + 'output_types = ["rtstruct", "seg"]\n' + PEER + DESTINATION)
    config = load_node_config(tmp_path / "node.toml")
    assert config.spool == tmp_path / "spool"
    assert config.output_types == ("rtstruct", "seg")
    assert [d.name for d in config.destinations] == ["planning"]
    assert config.quiet_seconds > config.quiet_seconds_after_release > 0


def test_who_may_call(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text(LEAST + PEER + '[[peer]]\nae_title = "PACS"\naddress = "fd00::5"\n')
    config = load_node_config(tmp_path / "node.toml")
    assert config.knows("CT_SIM ", "10.1.2.77")
    assert config.knows("CT_SIM", "::ffff:10.1.2.77")
    assert config.knows("PACS", "fd00::5")
    assert not config.knows("CT_SIM", "10.1.3.77")
    assert not config.knows("PACS", "10.1.2.77")
    assert not config.knows_address("10.1.3.77")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LEAST, r"peer is missing; expected one or more tables \[\[peer\]\]"),
        (LEAST + 'speed = "fast"\n' + PEER, "unknown key speed"),
        (LEAST.replace("11112", "70000") + PEER, "port is 70000; expected a port"),
        (LEAST.replace("ANATOMYNET", "A" * 17) + PEER, "expected an AE title"),
        (LEAST + PEER.replace("10.1.2.0/24", "ct-sim"), r"\[\[peer\]\]: address is 'ct-sim'; expected an address"),
        (LEAST + PEER + "port = 1\n", r"\[\[peer\]\]: unknown key port"),
        (LEAST + 'output_types = ["nifty"]\n' + PEER, "expected a list of some of rtstruct, seg, nifti"),
        (LEAST + "attempts = 2.5\n" + PEER, "attempts is 2.5"),
        (LEAST + "quiet_seconds = true\n" + PEER, "quiet_seconds is True"),
        (LEAST + PEER + DESTINATION + DESTINATION, "two destinations have one name"),
        ("ae_title = ", "is not TOML"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(NodeError, match=message):
        load(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="cannot be read"):
        load_node_config(tmp_path / "node.toml")
