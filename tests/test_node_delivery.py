"""What is sent on arrives as it is, and what a destination says decides whether it is asked again."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RTStructureSetStorage
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.events import Event

from anatomynet.client.node_config import Destination
from anatomynet.client.node_delivery import DeliveryError, deliver
from tests.dicom_nodes import NODE_TITLE, dcmtk, small_phantom
from tests.triton_servers import free_ports
from tests.waiting import wait_until

TITLE = "TPS"
# pynetdicom leaves a socket to the garbage collector where nobody listens.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(scope="module")
def rtstruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from anatomynet.client.contours import trace_contours
    from anatomynet.client.ct_writer import write_ct_series
    from anatomynet.client.rtstruct import write_rtstruct
    from anatomynet.engine.phantom import make_phantom

    folder = tmp_path_factory.mktemp("rtstruct")
    volume, truth = make_phantom(small_phantom().geometry)
    write_rtstruct(folder / "rs.dcm", write_ct_series(folder / "study", volume), trace_contours(truth))
    return folder / "rs.dcm"


def destination(port: int) -> Destination:
    return Destination("planning", TITLE, "127.0.0.1", port)


def send_to(port: int, path: Path) -> None:
    deliver([path], destination(port), ae_title=NODE_TITLE, timeout_s=5.0)


@contextmanager
def answering(status: int, *, storage: str = RTStructureSetStorage) -> Iterator[int]:
    """Port of a destination that answers every C-STORE so."""
    ae = AE(ae_title=TITLE)
    ae.require_calling_aet = [NODE_TITLE]
    ae.add_supported_context(storage, [ImplicitVRLittleEndian])

    def store(_event: Event) -> int:
        return status

    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    assert server
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()


@pytest.mark.parametrize("syntax", ["+xe", "+xi"])  # explicit, implicit: the one that it offers is used
def test_dcmtk_gets_it_as_it_is(rtstruct: Path, tmp_path: Path, syntax: str) -> None:
    (port,) = free_ports(1)
    command = [dcmtk("storescp"), "-v", syntax, "-od", str(tmp_path), "-aet", TITLE, str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: _sent(port, rtstruct), "storescp")
    finally:
        process.terminate()
        process.wait()
    (file,) = tmp_path.glob("*.[0-9]*")
    found = pydicom.dcmread(file)
    assert found == pydicom.dcmread(rtstruct)
    assert found.file_meta.TransferSyntaxUID == (ExplicitVRLittleEndian if syntax == "+xe" else ImplicitVRLittleEndian)


def _sent(port: int, path: Path) -> bool:
    try:
        send_to(port, path)
    except DeliveryError:  # not yet
        return False
    return True


@pytest.mark.parametrize("status", [0x0000, 0xB000, 0x0111])
def test_stored_is_stored(rtstruct: Path, status: int) -> None:
    with answering(status) as port:
        send_to(port, rtstruct)


@pytest.mark.parametrize(("status", "transient"), [(0xA700, True), (0xA900, False), (0xC000, False), (0x0110, False)])
def test_a_refusal_names_its_status(rtstruct: Path, status: int, transient: bool) -> None:
    with answering(status) as port, pytest.raises(DeliveryError, match=f"refused rs.dcm with status {status:04X}") as e:
        send_to(port, rtstruct)
    assert e.value.transient == transient


@pytest.mark.parametrize(
    ("error", "message", "transient"),
    [
        (RuntimeError("The association must be established"), "broke the association", True),
        (ValueError("of Secret^Name"), r"rs\.dcm could not be encoded for planning", False),
    ],
)
def test_what_pynetdicom_raises_is_a_delivery_that_failed(
    rtstruct: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str, transient: bool
) -> None:
    """RuntimeError: the association was aborted between a look at it and the request."""

    def send_c_store(*_: object) -> None:
        raise error

    monkeypatch.setattr(Association, "send_c_store", send_c_store)
    with answering(0) as port, pytest.raises(DeliveryError, match=message) as caught:
        send_to(port, rtstruct)
    assert caught.value.transient == transient
    assert "Secret" not in str(caught.value)


def test_who_takes_no_rtstruct_is_not_asked_again(rtstruct: Path) -> None:
    with (
        answering(0, storage="1.2.840.10008.5.1.4.1.1.2") as port,
        pytest.raises(DeliveryError, match="takes no RTSTRUCT") as error,
    ):
        send_to(port, rtstruct)
    assert not error.value.transient


def test_who_is_away_or_does_not_know_the_node_may_be_asked_again(rtstruct: Path) -> None:
    (port,) = free_ports(1)
    with pytest.raises(DeliveryError, match="is not there") as error:
        send_to(port, rtstruct)
    assert error.value.transient
    with answering(0) as port, pytest.raises(DeliveryError, match="does not let this node in") as error:
        deliver([rtstruct], destination(port), ae_title="ANOTHER", timeout_s=5.0)
    assert error.value.transient
