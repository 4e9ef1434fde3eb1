"""A peer that names gigabytes and sends them, to the node as a process: it is hung up on, and the node stays small."""

import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom.uid import CTImageStorage
from pynetdicom import AE, build_context
from pynetdicom.association import Association

from anatomynet.client.node_spool import RECEIVED
from tests.dicom_nodes import CALLER, NODE_TITLE, NodeProcess, send, write_series
from tests.triton_servers import free_ports

ASSOCIATE_RQ, P_DATA, RELEASE_RQ = 1, 4, 5
NAMED_BYTES = 3 << 30
# What is sent of it: enough to see, and to be borne where nothing hangs up.
SENT_BYTES = 128 << 20
MOST_GROWTH_KB = 24 << 10
PATIENCE_S = 20


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    node = NodeProcess(
        tmp_path_factory.mktemp("node"), destination_port=free_ports(1)[0], quiet_seconds_after_release=3600.0
    )
    node.start()
    associated(node).release()  # what its first caller makes it load is nothing that it is sent
    yield node
    node.kill()


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_series(tmp_path_factory.mktemp("study"), seed=1)


def associated(node: NodeProcess) -> Association:
    """As a peer that it knows."""
    ae = AE(ae_title=CALLER)
    ae.add_requested_context(CTImageStorage)
    association = ae.associate("127.0.0.1", node.port, ae_title=NODE_TITLE)
    assert association.is_established
    return association


def peak_kb(node: NodeProcess) -> int:
    assert node.process
    (peak,) = re.findall(r"VmHWM:\s*(\d+)", Path(f"/proc/{node.process.pid}/status").read_text())
    return int(peak)


def hangs_up(connection: socket.socket, pdu_type: int, *, length: int, most: int = SENT_BYTES) -> bool:
    """Whether the node ends a connection on which a PDU says its length and then comes, as far as `most`."""
    connection.settimeout(PATIENCE_S)
    try:
        connection.sendall(struct.pack(">BBL", pdu_type, 0, length))
        for _ in range(min(length, most) >> 20):
            connection.sendall(bytes(1 << 20))
        while connection.recv(4096):  # the abort, and then the end
            pass
    except TimeoutError:
        return False
    except OSError:  # reset, as unread bytes are
        pass
    return True


@pytest.mark.parametrize(
    "pdu_type", [ASSOCIATE_RQ, P_DATA, RELEASE_RQ], ids=["A-ASSOCIATE-RQ", "P-DATA-TF", "A-RELEASE-RQ"]
)
def test_gigabytes_before_an_association(node: NodeProcess, pdu_type: int) -> None:
    before, told = peak_kb(node), len(node.lines("refused"))
    with socket.create_connection(("127.0.0.1", node.port)) as connection:
        assert hangs_up(connection, pdu_type, length=NAMED_BYTES)
    assert peak_kb(node) - before < MOST_GROWTH_KB
    (line,) = node.lines("refused")[told:]
    assert line.endswith('reason="a PDU of 3221225472 bytes; expected at most 262144" address=127.0.0.1')


def test_gigabytes_from_a_known_caller(node: NodeProcess, series: list[Path]) -> None:
    before, told, failures = peak_kb(node), len(node.lines("refused")), len(node.lines("failure"))
    association = associated(node)
    assert association.dul.socket
    assert association.dul.socket.socket
    with association.dul.socket.socket as connection:
        assert hangs_up(connection, P_DATA, length=NAMED_BYTES)
        association.abort()
    assert peak_kb(node) - before < MOST_GROWTH_KB
    assert len(node.lines("refused")) == told + 1
    assert send(node.port, series).returncode == 0  # the next one is served
    assert len(list((node.spool / RECEIVED).glob("*/ct/*.dcm"))) == len(series)
    assert len(node.lines("failure")) == failures


def test_the_longest_request_that_the_standard_knows_is_read(node: NodeProcess) -> None:
    """128 presentation contexts, which is all that odd numbers of a byte give, of 20 transfer syntaxes each: 184 KB."""
    syntaxes = [f"1.2.{index:02d}{'7' * 58}" for index in range(10, 30)]
    contexts = [build_context(f"1.2.{index:03d}{'7' * 57}", syntaxes) for index in range(100, 227)]
    ae = AE(ae_title=CALLER)
    association = ae.associate(
        "127.0.0.1", node.port, ae_title=NODE_TITLE, contexts=[*contexts, build_context(CTImageStorage)]
    )
    assert association.is_established
    association.release()
