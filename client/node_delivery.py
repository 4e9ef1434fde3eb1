"""Results -> the treatment planning system, or whoever a node's settings name: C-STORE as an SCU."""

from collections.abc import Sequence
from pathlib import Path

import pydicom
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association

from anatomynet.client.node_config import Destination
from anatomynet.engine.errors import NodeError

# Out of resources: the destination's disk may have room again later (PS3.4 B.2.3).
TRANSIENT_STATUSES = range(0xA700, 0xA800)
# Success; warnings: the object was stored (PS3.4 B.2.3); duplicate SOP instance: it was stored before.
STORED_STATUSES = (0x0000, 0xB000, 0xB006, 0xB007, 0x0111)


class DeliveryError(NodeError):
    """A destination that did not take a result.

    Attributes:
        transient: it may take it later.
    """

    def __init__(self, message: str, *, transient: bool = True) -> None:
        super().__init__(message)
        self.transient = transient


def deliver(paths: Sequence[Path], destination: Destination, *, ae_title: str, timeout_s: float) -> None:
    """Sends files to a destination, which has all of them when this returns.

    What is sent again keeps its SOPInstanceUID, by which a destination knows that it has it.

    Args:
        paths: DICOM files.
        destination: who gets them.
        ae_title: the node's own.
        timeout_s: to connect, and for each answer.

    Raises:
        DeliveryError: it is not there, does not let this node in, or refuses a file.
    """
    classes = {path: pydicom.dcmread(path, specific_tags=["SOPClassUID"]).SOPClassUID for path in paths}
    ae = AE(ae_title=ae_title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = timeout_s
    for uid in sorted(set(classes.values())):
        ae.add_requested_context(uid, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    where = f"{destination.name} ({destination.ae_title} at {destination.host}:{destination.port})"
    association = ae.associate(destination.host, destination.port, ae_title=destination.ae_title)
    if not association.is_established:
        raise DeliveryError(f"{where} {_no_association(association)}", transient=not association.rejected_contexts)
    try:
        accepted = {context.abstract_syntax for context in association.accepted_contexts}
        for path, uid in classes.items():
            if uid not in accepted:
                raise DeliveryError(f"{where} does not take {uid.name}; let it, then --retry", transient=False)
            _send(association, path, where)
    finally:
        association.release()


def _send(association: Association, path: Path, where: str) -> None:
    if not association.is_established:
        raise DeliveryError(f"{where} broke the association")
    try:
        status = association.send_c_store(path).get("Status")
    except RuntimeError as error:  # aborted since it was looked at
        raise DeliveryError(f"{where} broke the association") from error
    except ValueError as error:  # whose text may quote the file
        message = f"{path.name} could not be encoded for {where}; let it take another transfer syntax, then --retry"
        raise DeliveryError(message, transient=False) from error
    if status is None:
        raise DeliveryError(f"{where} gave no answer")
    if status not in STORED_STATUSES:
        raise DeliveryError(
            f"{where} refused {path.name} with status {status:04X}; see its log, then --retry",
            transient=status in TRANSIENT_STATUSES,
        )


def _no_association(association: Association) -> str:
    if association.rejected_contexts:
        return "takes no RTSTRUCT, or none of what is sent; let it, then --retry"
    if association.is_rejected:
        return "does not let this node in; expected it to know the node's AE title and address"
    return "is not there; expected a DICOM node"
