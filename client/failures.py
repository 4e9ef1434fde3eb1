"""What a failed question to a server means: what may go better, where and when, and what to do about the rest.

Asking again is always safe: a question changes nothing at a server.
"""

from enum import Enum
from typing import TYPE_CHECKING

from anatomynet.engine.errors import ServerBusyError, ServerError

if TYPE_CHECKING:
    from tritonclient.utils import InferenceServerException

QUEUE_FULL = "maximum queue size"
MEMORY_FULL = "shared memory pool"
# What Triton says, and what to do.
REMEDIES = {
    QUEUE_FULL: "it is busy: try again later",
    "Stub process": "its model died, as for want of memory, though it says READY: restart tritonserver",
    MEMORY_FULL: "its /dev/shm is full: give the server's container more, as docker --shm-size=1g does",
}
# A closed API, and shared memory that is switched off: UNAVAILABLE by their status, and so they stay.
REFUSALS = ("protocol is restricted", "allow-client-shm", "allow_client_shm")
TOO_LITTLE_MEMORY = "GB of memory"  # engine.limits.MemoryGuard at the server; another may have more
# However gRPC's status calls them: they would fail again at the same server.
LASTING_SYMPTOMS = (
    "handshake failed",
    "CERTIFICATE",
    "SSL_ERROR",
    "DNS resolution failed",
    "Check failed",
    TOO_LITTLE_MEMORY,
    *REFUSALS,
)
# A server that went away in the middle, a model that is being reloaded, a server that has been restarted since it
# was given a region of shared memory.
PASSING_SYMPTOMS = ("RST_STREAM", "Stream removed", "no available versions", "find shared memory region")


class Outlook(Enum):
    """Whether the same question may yet be answered."""

    LATER = "by the same server in a while"
    ELSEWHERE = "by another server"
    NEVER = "by none"


class AttemptError(Exception):
    """One question to one server that failed."""

    def __init__(self, message: str, *, reason: str, outlook: Outlook, busy: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.outlook = outlook
        self.busy = busy

    def as_server_error(self) -> ServerError:
        """What a user of the runtime gets, once nothing more is tried."""
        return (ServerBusyError if self.busy else ServerError)(str(self))


def attempt_error(error: "InferenceServerException | None", before: str, after: str = "") -> AttemptError:
    """The AttemptError with the message "BEFORE (what the server, or gRPC, said)AFTER"; None is an empty answer."""
    reason = reason_of(error)
    busy = error is not None and QUEUE_FULL in error.message()
    return AttemptError(f"{before} ({reason}){after}", reason=reason, outlook=outlook_of(error), busy=busy)


def outlook_of(error: "InferenceServerException | None") -> Outlook:
    """What to hope for after an error."""
    if error is None:
        return Outlook.ELSEWHERE
    text, status = str(error.message()), str(error.status()).removeprefix("StatusCode.")
    if any(symptom in text for symptom in LASTING_SYMPTOMS):
        return Outlook.ELSEWHERE
    if any(symptom in text for symptom in PASSING_SYMPTOMS) or status in ("UNAVAILABLE", "CANCELLED", "ABORTED"):
        return Outlook.LATER
    if status in ("INVALID_ARGUMENT", "OUT_OF_RANGE", "FAILED_PRECONDITION"):
        return Outlook.NEVER
    return Outlook.ELSEWHERE


def reason_of(error: "InferenceServerException | None") -> str:
    """What the server, or gRPC, said, in one line, and what to do where that is known."""
    if error is None:
        return "an empty answer"
    text = " ".join(str(error.message()).split()).removeprefix("[request id: <id_unknown>] ")
    for symptom, remedy in REMEDIES.items():
        if symptom in text:
            return f"{_last_cause(text)}; {remedy}"
    return _last_cause(text)


def _last_cause(text: str) -> str:
    """Without the addresses that gRPC tried on the way."""
    return text.rpartition("last error: ")[2].rpartition("Failed to connect to remote host: ")[2]
