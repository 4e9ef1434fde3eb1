"""The SCP, spoken to by dcmtk: who is let in, what is taken, and the statuses of what is not."""

import gc
import logging
import subprocess
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pydicom
import pytest
from pydicom.uid import CTImageStorage
from pynetdicom import AE
from pynetdicom.events import Event
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.pdu_items import PresentationDataValueItem

from anatomynet.client.headers import CT_CLASSES
from anatomynet.client.node_arrivals import Arrivals
from anatomynet.client.node_config import NodeConfig, Peer
from anatomynet.client.node_receiver import _Receiver, _RefusedError, instance_from_bytes, listening
from anatomynet.client.node_spool import PARKED, RECEIVED, Spool
from tests.dicom_nodes import CALLER, NODE_TITLE, dcmtk, node_config, send, write_series
from tests.dicom_studies import edit
from tests.full_disk import largest_file


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_series(tmp_path_factory.mktemp("study"), seed=1)


@contextmanager
def node(folder: Path, **changes: Any) -> Iterator[tuple[int, Spool]]:
    """Port and spool of a node that listens."""
    config: NodeConfig = node_config(folder / "spool", **changes)
    spool = Spool(config.spool)
    spool.prepare()
    arrivals = Arrivals(spool, most_instances=config.most_instances)
    with listening(config, arrivals) as (_, port):
        yield port, spool


def received(spool: Spool) -> list[Path]:
    return list((spool.folder / RECEIVED).glob("*/ct/*.dcm"))


def echo(port: int) -> bool:
    command = [dcmtk("echoscu"), "-aet", CALLER, "-aec", NODE_TITLE, "127.0.0.1", str(port)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_echo_and_store(series: list[Path], tmp_path: Path) -> None:
    with node(tmp_path) as (port, spool):
        assert echo(port)
        run = send(port, series)
        assert run.returncode == 0, run.stdout
        stored = {pydicom.dcmread(path).SOPInstanceUID for path in received(spool)}
        assert stored == {pydicom.dcmread(path).SOPInstanceUID for path in series}


@pytest.mark.parametrize(
    ("titles", "reason"),
    [
        ({"calling": "STRANGER"}, "Calling AE Title Not Recognized"),
        ({"called": "ANOTHER"}, "Called AE Title Not Recognized"),
    ],
)
def test_other_titles_are_rejected(series: list[Path], tmp_path: Path, titles: dict[str, str], reason: str) -> None:
    with node(tmp_path) as (port, spool):
        run = send(port, series[:1], **titles)
        assert run.returncode != 0
        assert reason in run.stdout + run.stderr
        assert not received(spool)


def test_a_title_from_another_peers_address_is_rejected(series: list[Path], tmp_path: Path) -> None:
    peers = (Peer(CALLER, ip_network("10.1.2.3")), Peer("PACS", ip_network("127.0.0.1")))
    with node(tmp_path, peers=peers) as (port, spool):
        assert "Calling AE Title Not Recognized" in send(port, series[:1]).stderr
        assert send(port, series[:1], calling="PACS").returncode == 0
        assert len(received(spool)) == 1


def test_an_unknown_address_is_hung_up_on(series: list[Path], tmp_path: Path) -> None:
    with node(tmp_path, peers=(Peer(CALLER, ip_network("10.1.2.3")),)) as (port, spool):
        assert send(port, series[:1]).returncode != 0
        assert not received(spool)


def test_one_association_too_many_is_rejected(tmp_path: Path) -> None:
    ae = AE(ae_title=CALLER)
    ae.add_requested_context(CTImageStorage)
    with node(tmp_path, most_associations=2) as (port, _), ExitStack() as stack:
        for _ in range(2):
            association = ae.associate("127.0.0.1", port, ae_title=NODE_TITLE)
            stack.callback(association.release)
            assert association.is_established
        assert ae.associate("127.0.0.1", port, ae_title=NODE_TITLE).is_rejected


def test_every_ct_that_can_be_read_is_taken(tmp_path: Path) -> None:
    ae = AE(ae_title=CALLER)
    for storage in sorted(CT_CLASSES):
        ae.add_requested_context(storage)
    with node(tmp_path) as (port, _):
        association = ae.associate("127.0.0.1", port, ae_title=NODE_TITLE)
        assert {context.abstract_syntax for context in association.accepted_contexts} == CT_CLASSES
        association.release()


def test_what_is_no_ct_is_not_taken(tmp_path: Path, series: list[Path]) -> None:
    other = tmp_path / "mr.dcm"
    other.write_bytes(series[0].read_bytes())
    edit(other, SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    with node(tmp_path) as (port, spool):
        assert "No presentation context" in (run := send(port, [other])).stdout + run.stderr
        assert not received(spool)


@pytest.mark.parametrize("full", ["by the setting", "by the disk"])
def test_a_full_disk_is_a700_and_the_node_stays(series: list[Path], tmp_path: Path, full: str) -> None:
    with node(tmp_path, smallest_free_gb=1e6 if full == "by the setting" else 0.0) as (port, spool):
        if full == "by the disk":
            with largest_file(2048):
                run = send_in_process(port, series[:2])
            assert run == [0xA700, 0xA700]
            assert send(port, series).returncode == 0
        else:
            assert "A700" in send(port, series[:1], options=["-d"]).stderr.upper()
        assert echo(port)
        assert len(received(spool)) == (len(series) if full == "by the disk" else 0)
        assert not list(spool.folder.rglob("*.part"))


def send_in_process(port: int, paths: list[Path]) -> list[int]:
    """The status of each."""
    ae = AE(ae_title=CALLER)
    ae.add_requested_context(CTImageStorage)
    association = ae.associate("127.0.0.1", port, ae_title=NODE_TITLE)
    statuses = [association.send_c_store(path).get("Status", -1) for path in paths]
    association.release()
    return statuses


def test_too_many_instances_are_a700(series: list[Path], tmp_path: Path) -> None:
    with node(tmp_path, most_instances=3) as (port, spool):
        assert send_in_process(port, series[:4]) == [0, 0, 0, 0xA700]
        assert len(received(spool)) == 3


def test_an_instance_that_is_too_large_ends_its_association(series: list[Path], tmp_path: Path) -> None:
    with node(tmp_path, largest_instance_mb=0.02) as (port, spool):
        assert send(port, series[:1]).returncode != 0
        assert not received(spool)
        assert echo(port)


class Breakable:
    """As much of an association as `_Receiver` asks for; like pynetdicom it says at once that it was broken."""

    requestor = SimpleNamespace(ae_title=CALLER)
    dul = SimpleNamespace(socket=None)
    is_aborted = False

    def __init__(self, receiver: _Receiver) -> None:
        self._receiver = receiver

    def abort(self, *, block: bool) -> None:
        assert not block
        self.is_aborted = True
        self._receiver.aborted(cast("Event", SimpleNamespace(assoc=self)))


def test_an_instance_that_is_too_large_is_told_once_and_not_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was sent before the sender heard of it is still read, a hundred pieces and more."""
    caplog.set_level(logging.INFO)
    config = node_config(tmp_path, largest_instance_mb=0.02)
    Spool(tmp_path / "spool").prepare()
    receiver = _Receiver(config, Arrivals(Spool(tmp_path / "spool"), most_instances=100))
    association = Breakable(receiver)
    piece = P_DATA_TF()
    piece.presentation_data_value_items = [PresentationDataValueItem()]
    piece.presentation_data_value_items[0].presentation_data_value = bytes(8000)
    for _ in range(100):
        receiver.measure(cast("Event", SimpleNamespace(assoc=association, pdu=piece)))
    assert [record.message.split()[0] for record in caplog.records] == ["refused", "broken"]
    gone = weakref.ref(association)
    del association
    gc.collect()
    assert gone() is None


def test_a_slice_on_disk_after_its_association_was_broken_does_not_count_as_its_end(
    series: list[Path], tmp_path: Path
) -> None:
    """An association is broken by the thread that reads, while another stores what came before."""
    spool = Spool(tmp_path / "spool")
    spool.prepare()
    arrivals = Arrivals(spool, most_instances=100)
    receiver = _Receiver(node_config(spool.folder), arrivals)
    association = Breakable(receiver)
    association.abort(block=False)
    data = series[0].read_bytes()
    request = SimpleNamespace(AffectedSOPInstanceUID=pydicom.dcmread(series[0]).SOPInstanceUID)
    event = SimpleNamespace(assoc=association, request=request, encoded_dataset=lambda: data)
    receiver.store(cast("Event", event))
    (key,) = arrivals.settled(quiet_seconds=0, after_release=0)
    job = arrivals.complete(key, quiet_seconds=0, after_release=0)
    assert job
    assert job.state == PARKED


def test_damaged_instances_are_refused(series: list[Path]) -> None:
    data = series[0].read_bytes()
    uid = str(pydicom.dcmread(series[0]).SOPInstanceUID)
    assert instance_from_bytes(data, uid).sop_instance_uid == uid
    for damaged, status in ((data[:-100], 0xC000), (data[:300], 0xC000), (b"no DICOM", 0xC000)):
        with pytest.raises(_RefusedError) as refusal:
            instance_from_bytes(damaged, uid)
        assert refusal.value.status == status
    with pytest.raises(_RefusedError) as refusal:
        instance_from_bytes(data, "1.2.3")
    assert refusal.value.status == 0xA900


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_a_uid_that_is_a_path_is_refused(series: list[Path], tmp_path: Path) -> None:
    evil = tmp_path / "evil.dcm"
    evil.write_bytes(series[0].read_bytes())
    dataset = pydicom.dcmread(evil)
    data = evil.read_bytes().replace(str(dataset.SeriesInstanceUID).encode(), b"../" * 21 + b"1")
    with pytest.raises(_RefusedError, match="a UID that is none"):
        instance_from_bytes(data, str(dataset.SOPInstanceUID))
