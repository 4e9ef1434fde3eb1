"""A bound on what is read of a peer: pynetdicom reads a PDU whole, of up to 4 GiB, before it asks who sent it.

Its `DULServiceProvider._read_pdu_data` asks `AssociationSocket.recv` for the header, then for as much as that names.
"""

from pynetdicom.events import Event
from pynetdicom.pdu import A_ABORT_RQ
from pynetdicom.transport import AssociationSocket

from anatomynet.client.node_log import log

ANNOUNCED_PDU = 128 << 10  # a slice in five pieces, not in 33
# Of data more than was announced, for peers that miscount headers; and 128 contexts of 20 syntaxes, all UIDs of the
# longest, which are an A-ASSOCIATE-RQ of 184 KB.
LARGEST_PDU = 2 * ANNOUNCED_PDU
# A-ABORT (PS3.8 9.3.8): by the service provider, an invalid value of a PDU's parameter.
BY_PROVIDER, INVALID_VALUE = 0x02, 0x06


def bound_reading(event: Event) -> None:
    """EVT_CONN_OPEN: reads of this connection no PDU above LARGEST_PDU, but breaks it."""
    dul = event.assoc.dul
    if dul.socket is not None and dul.socket.socket is not None:
        dul.socket = _BoundedSocket(event.assoc, client_socket=dul.socket.socket)
        dul.event_queue.get_nowait()  # both sockets say that a connection was opened; it is one


class _BoundedSocket(AssociationSocket):
    def recv(self, nr_bytes: int) -> bytearray:
        """As many bytes; none, as of a connection that is closed, where they are more than a PDU may have."""
        if nr_bytes <= LARGEST_PDU:
            return super().recv(nr_bytes)
        log(
            "refused",
            reason=f"a PDU of {nr_bytes} bytes; expected at most {LARGEST_PDU}",
            address=self.assoc.requestor.address,
        )
        abort = A_ABORT_RQ()
        abort.source, abort.reason_diagnostic = BY_PROVIDER, INVALID_VALUE
        self.send(abort.encode())
        return bytearray()
