"""The DICOM node's ears: an SCP for C-ECHO and C-STORE of CT, which lets in only those whom the settings name.

Bytes -> Instance -> Arrivals. Nothing is acknowledged before it is on disk.
"""

import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from socketserver import BaseServer
from typing import Any
from weakref import WeakKeyDictionary

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import (
    JPEG2000,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import ThreadedAssociationServer

from anatomynet.client.codecs import is_readable
from anatomynet.client.headers import CT_CLASSES, DAMAGED, uid_tail
from anatomynet.client.node_arrivals import STARTED, STORED, Arrivals, Instance
from anatomynet.client.node_config import NodeConfig
from anatomynet.client.node_log import log, log_failure
from anatomynet.client.node_socket import ANNOUNCED_PDU, bound_reading
from anatomynet.engine.errors import NodeError, OutputError

SUCCESS, OUT_OF_RESOURCES, NOT_OF_ITS_CLASS, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xA900, 0xC000
# A-ASSOCIATE-RJ (PS3.8 9.3.4): permanent, by the service user, calling AE title not recognised.
UNKNOWN_CALLER = (0x01, 0x01, 0x03)
RAW_SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
COMPRESSED_SYNTAXES = (
    JPEG2000Lossless,
    JPEG2000,
    JPEGLSLossless,
    JPEGLosslessSV1,
    HTJ2KLossless,
    RLELossless,
)
RELEASE_GRACE_S = 5.0
UID_CHARACTERS = frozenset("0123456789.")
LONGEST_UID = 64


@contextmanager
def listening(config: NodeConfig, arrivals: Arrivals) -> Iterator[tuple[str, int]]:
    """Receives in threads of its own for as long as the block lasts; then lets open associations end.

    Yields:
        Address and port.

    Raises:
        NodeError: the port is taken, or not this user's to open.
    """
    _config.LOG_HANDLER_LEVEL = "none"  # pynetdicom's own log names patients
    receiver = _Receiver(config, arrivals)
    ae = AE(ae_title=config.ae_title)
    ae.require_called_aet = True
    ae.maximum_associations = config.most_associations
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = config.timeout_seconds
    ae.maximum_pdu_size = ANNOUNCED_PDU
    ae.add_supported_context(Verification)
    for storage in sorted(CT_CLASSES):
        ae.add_supported_context(storage, list(readable_syntaxes()))
    handlers: list[Any] = [
        (evt.EVT_CONN_OPEN, bound_reading),
        (evt.EVT_REQUESTED, receiver.check_caller),
        (evt.EVT_REJECTED, receiver.rejected),
        (evt.EVT_PDU_RECV, receiver.measure),
        (evt.EVT_PDU_SENT, lambda event: _acknowledge_at_once(event.assoc)),
        (evt.EVT_C_STORE, receiver.store),
        (evt.EVT_RELEASED, receiver.released),
        (evt.EVT_ABORTED, receiver.aborted),
    ]
    try:
        server = ae.make_server(
            (config.bind, config.port), evt_handlers=handlers, server_class=_server_for(config.knows_address)
        )
    except OSError as error:
        raise NodeError(f"cannot listen on port {config.port}: {error.strerror or error}; choose another?") from error
    thread = threading.Thread(target=server.serve_forever, name="listener", daemon=True)
    thread.start()
    try:
        yield server.server_address[0], server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        deadline = time.monotonic() + RELEASE_GRACE_S
        while server.active_associations and time.monotonic() < deadline:
            time.sleep(0.05)
        for association in server.active_associations:
            association.abort()


def readable_syntaxes() -> tuple[str, ...]:
    """Transfer syntaxes that can be read here: what needs a codec that is not installed, a sender must unpack."""
    return (*RAW_SYNTAXES, *(uid for uid in COMPRESSED_SYNTAXES if is_readable(uid)))


def _server_for(knows_address: Callable[[str], bool]) -> type[ThreadedAssociationServer]:
    """A server that hangs up on addresses nobody named, before it reads a byte."""

    class _Server(ThreadedAssociationServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            known = knows_address(client_address[0])
            if not known:
                log("refused", reason="unknown address", address=client_address[0])
            return known

        def shutdown(self) -> None:
            BaseServer.shutdown(self)  # pynetdicom's own is for servers that its AE started
            self.server_close()

        def handle_error(self, request: Any, client_address: Any) -> None:
            log_failure(sys.exc_info()[1])

    return _Server


class _Receiver:
    """What is done at each event of an association; called in its own thread."""

    def __init__(self, config: NodeConfig, arrivals: Arrivals) -> None:
        self._config = config
        self._arrivals = arrivals
        self._largest = int(config.largest_instance_mb * 1e6)
        # Weak, for what is still read or stored of an association after its end.
        self._measured: WeakKeyDictionary[Association, int] = WeakKeyDictionary()
        self._counts: WeakKeyDictionary[Association, Counter[str]] = WeakKeyDictionary()

    def check_caller(self, event: Event) -> None:
        """Rejects a caller that no [[peer]] names."""
        caller = event.assoc.requestor
        title = str(caller.primitive.calling_ae_title) if caller.primitive else ""
        if not self._config.knows(title, caller.address):
            event.assoc.acse.send_reject(*UNKNOWN_CALLER)
            event.assoc.kill()  # when it is sent
            log("refused", reason="unknown AE title at this address", calling=title, address=caller.address)

    def rejected(self, event: Event) -> None:
        """Logs what pynetdicom rejects of itself."""
        caller = event.assoc.requestor
        log("refused", reason="wrong AE title or too many associations", calling=caller.ae_title)

    def measure(self, event: Event) -> None:
        """Breaks an association before an instance that is too large fills the memory."""
        assoc = event.assoc
        if not isinstance(event.pdu, P_DATA_TF) or assoc.is_aborted:  # what was on its way already
            return
        _acknowledge_at_once(assoc)
        data = [item.presentation_data_value or b"\1" for item in event.pdu.presentation_data_value_items]
        ends = any(each[0] & 0b11 == 0b10 for each in data)  # a message's last piece of data (PS3.8 E.2)
        size = self._measured.pop(assoc, 0) + sum(map(len, data))
        if ends:
            return
        if size > self._largest:
            log("refused", reason="instance above largest_instance_mb", calling=assoc.requestor.ae_title)
            assoc.abort(block=False)
            return
        self._measured[assoc] = size

    def store(self, event: Event) -> int:
        """C-STORE: the status to answer with."""
        request: Any = event.request
        try:
            instance = instance_from_bytes(event.encoded_dataset(), str(request.AffectedSOPInstanceUID))
        except _RefusedError as refusal:
            log("refused", reason=str(refusal), calling=event.assoc.requestor.ae_title)
            return refusal.status
        tail = uid_tail(instance.series_instance_uid)
        try:
            self._check_size(len(instance.data))
            done = self._arrivals.receive(instance, source=event.assoc.requestor.ae_title, sender=event.assoc)
        except (NodeError, OutputError, OSError) as error:
            log("refused", series=tail, reason=error)
            return OUT_OF_RESOURCES
        if event.assoc.is_aborted:  # by `measure`, in another thread, before this slice was there
            self._arrivals.lose(event.assoc)
        if done == STARTED:
            log(done, series=tail, calling=event.assoc.requestor.ae_title)
        self._counts.setdefault(event.assoc, Counter())[STORED if done == STARTED else done] += 1
        return SUCCESS

    def released(self, event: Event) -> None:
        """The caller has said all."""
        self._arrivals.release(event.assoc)
        self._log_end("released", event.assoc)

    def aborted(self, event: Event) -> None:
        """The connection broke, or was broken."""
        self._arrivals.lose(event.assoc)
        self._log_end("broken", event.assoc)

    def _log_end(self, how: str, association: Association) -> None:
        self._measured.pop(association, None)
        counts = self._counts.pop(association, Counter())
        if counts or how == "broken":
            log(how, calling=association.requestor.ae_title, **counts)

    def _check_size(self, size: int) -> None:
        if size > self._largest:
            raise NodeError(f"an instance of {size / 1e6:.1f} MB; expected at most largest_instance_mb")
        free = self._arrivals.free_bytes() - size
        if free < self._config.smallest_free_gb * 1e9:
            raise NodeError(f"{free / 1e9:.1f} GB free on the spool's disk; expected {self._config.smallest_free_gb:g}")


def _acknowledge_at_once(association: Association) -> None:
    """Spares a sender that waits for TCP's delayed acknowledgement, as most do, 40 ms a slice."""
    connection = association.dul.socket.socket if association.dul.socket else None
    if connection is not None and hasattr(socket, "TCP_QUICKACK"):
        with suppress(OSError):  # closed meanwhile
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


class _RefusedError(Exception):
    """An instance that is not stored, and the status that says so."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def instance_from_bytes(data: bytes, affected_uid: str) -> Instance:
    """What a C-STORE brought, checked as far as it can be alone.

    Args:
        data: a whole DICOM file.
        affected_uid: SOPInstanceUID that the request names.

    Raises:
        _RefusedError: it is damaged, cut short, of another UID than its request, or lacks what a slice must have.
    """
    try:
        dataset = pydicom.dcmread(BytesIO(data))
        uids = [str(dataset.SeriesInstanceUID), str(dataset.SOPInstanceUID)]
        missing = _missing_bytes(dataset)
    except DAMAGED as error:
        raise _RefusedError(NOT_UNDERSTOOD, "an instance that is damaged, or lacks what a slice must have") from error
    if missing:
        raise _RefusedError(NOT_UNDERSTOOD, f"{uid_tail(uids[1])} lacks {missing} bytes of its pixels")
    if any(not 0 < len(uid) <= LONGEST_UID or not set(uid) <= UID_CHARACTERS for uid in uids):
        raise _RefusedError(NOT_UNDERSTOOD, "a UID that is none")
    if uids[1] != affected_uid:
        raise _RefusedError(NOT_OF_ITS_CLASS, f"{uid_tail(uids[1])} is not the instance that its request names")
    return Instance(uids[0], uids[1], data)


def _missing_bytes(dataset: Dataset) -> int:
    """How much uncompressed pixels fall short of their rows and columns; pydicom does not mind."""
    found = len(dataset.PixelData)
    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        return 0
    frames = int(dataset.get("NumberOfFrames") or 1)
    return max(0, frames * int(dataset.Rows) * int(dataset.Columns) * int(dataset.BitsAllocated) // 8 - found)
