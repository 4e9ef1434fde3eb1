"""What a failed question to a server means: what may go better, where and when, and what to do about the rest.

Asking again is always safe: a question changes nothing at a server.
"""

from enum import Enum
from typing import TYPE_CHECKING

from anatomynet.engine.errors import ModelError, ServerBusyError, ServerError

if TYPE_CHECKING:
    from tritonclient.utils import InferenceServerException

QUEUE_FULL = "maximum queue size"
MEMORY_FULL = "shared memory pool"
DEAD_MODEL = "Stub process"
LOST_REGION = "find shared memory region"
# What a proxy answers who asks too often: deploy/nginx, and any other.
RATE_LIMITS = ("rate limit", "status: 429")
# gRPC's words where a connection was asked for and nothing came back, not even a refusal: which, is chance.
SWALLOWED = ("connect() timed out", "tcp handshaker shutdown")
# What Triton, gRPC or a proxy says, and what to do.
REMEDIES = {
    QUEUE_FULL: "it is busy: try again later",
    DEAD_MODEL: "its model died, as for want of memory, though it says READY: restart tritonserver",
    MEMORY_FULL: "its /dev/shm is full: give the server's container more, as docker --shm-size=1g does",
    **dict.fromkeys(RATE_LIMITS, "it was asked too often: try again later"),
    **dict.fromkeys(SWALLOWED, "nobody answers there: check the address, its machine, and any firewall before it"),
    "Hostname Verification": "its certificate is for another name: give --url the name that stands in it",
    "certificate has expired": "a certificate is past its date: whoever issued it has to renew it",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not from a CA of --tls-ca; without --tls-ca only public CAs count",
    "WRONG_VERSION_NUMBER": "it speaks no TLS: expected another port, or HOST:PORT without https://",
    "http1.x server": "it speaks no gRPC, or wants TLS: expected another port, or --url https://HOST:PORT",
    "client certificate: NONE": "give this client's with --tls-cert and --tls-key",
    "client certificate: ": "it does not take that of --tls-cert: its administrator has to issue another",
    "CERTIFICATE_REQUIRED": "give this client's certificate with --tls-cert and --tls-key",
    "_ALERT_": "it does not take the certificate of --tls-cert, or wants one",
    "status: 400": "a proxy refused it, as where no certificate that it knows is in --tls-cert and --tls-key",
    **dict.fromkeys(
        ("API key", "status: 401"), "give the right one by --api-key-file or ANATOMYNET_API_KEY, with https:// in --url"
    ),
    "status: 403": "a proxy does not let this client in: its administrator has to",
    "status: 413": "a proxy takes no volume of this size: its administrator has to raise its limit",
}
# A closed API, and shared memory that is switched off: UNAVAILABLE by their status, and so they stay.
REFUSALS = ("protocol is restricted", "allow-client-shm", "allow_client_shm")
TOO_LITTLE_MEMORY = "GB of memory"  # engine.machine.MemoryGuard at the server; another may have more
# However gRPC's status calls them: they would fail again at the same server.
LASTING_SYMPTOMS = (
    "SSL_ERROR_SSL",
    "security handshaker",
    "http1.x server",
    "DNS resolution failed",
    "Check failed",
    TOO_LITTLE_MEMORY,
    *REFUSALS,
)
# A server that went away in the middle, a model that is being reloaded, a server that has been restarted since it
# was given a region of shared memory.
PASSING_SYMPTOMS = ("RST_STREAM", "Stream removed", "no available versions", LOST_REGION)
# What stands before the cause: the addresses that gRPC tried on the way, and its own machinery.
BEFORE_THE_CAUSE = (
    "last error: ",
    "Failed to connect to remote host: ",
    "with error: UNAUTHENTICATED: ",
    "OPENSSL_internal:",
    "[request id: <id_unknown>] ",
)
# What OpenSSL's machinery adds to it.
AFTER_THE_CAUSE = (": OK", ": Invalid certificate verification context")


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


def unknown_model(name: str, error: ModelError) -> ServerError:
    """Of a served model whose parameters are not understood here."""
    return ServerError(f"the model {name} cannot be used: {error}: update this client, or export it again")


def attempt_error(error: "InferenceServerException | None", before: str, after: str = "") -> AttemptError:
    """The AttemptError "BEFORE (what the server, or gRPC, said; what to do)"; None is an empty answer.

    Args:
        after: what to do where the cause alone does not tell.
    """
    reason = reason_of(error)
    text = str(error.message()) if error is not None else ""
    busy = any(symptom in text for symptom in (QUEUE_FULL, *RATE_LIMITS))
    known = any(symptom in text for symptom in REMEDIES)
    message = f"{before} ({reason}){'' if known else after}"
    return AttemptError(message, reason=reason, outlook=outlook_of(error), busy=busy)


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
    text = " ".join(str(error.message()).split())
    cause = _cause(text)
    for symptom, remedy in REMEDIES.items():
        if symptom in text:
            return f"{cause}; {remedy}"
    return cause


def _cause(text: str) -> str:
    for noise in BEFORE_THE_CAUSE:
        text = text.rpartition(noise)[2]
    for noise in AFTER_THE_CAUSE:
        text = text.removesuffix(noise)
    return text
