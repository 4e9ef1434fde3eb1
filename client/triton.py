"""TritonRuntime: a Triton server as a runtime. The middle of `segment`, where the network runs elsewhere.

A volume crosses to a server on this machine in shared memory, to any other by gRPC. Only voxels, the model's name and
a random one go on the wire.
"""

import mmap
import os
import queue
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.config import ModelConfig, model_config_from_json
from anatomynet.engine.errors import ServerBusyError, ServerError
from anatomynet.engine.volume import HounsfieldArray, LabelArray

if TYPE_CHECKING:
    from tritonclient.grpc import InferenceServerClient, InferResult
    from tritonclient.utils import InferenceServerException

MODEL_NAME = "anatomynet"
DEFAULT_URL = "localhost:8001"
DEFAULT_PORT = 8001
TLS_SCHEME = "grpcs://"
RESOLVED_SCHEMES = ("dns:", "ipv4:", "ipv6:")
# For one volume: a full queue of whole volumes on two CPU cores.
TIMEOUT_S = 120.0
CONNECT_TIMEOUT_S = 5.0
# On this machine who listens answers soon, or is no Triton.
PROBE_TIMEOUT_S = 1.0
# The largest message protobuf allows; gRPC's own limit on answers is 4 MB.
LARGEST_MESSAGE = 2**31 - 1
SHARED_MEMORY_FOLDER = Path("/dev/shm")
REGION_PREFIX = "anatomynet-"
# So long after its time-out a cancelled request may still write to its region.
REGION_GRACE_S = 600
START_A_SERVER = "start one with `tritonserver --model-repository triton_repo`"

# What Triton says of a region that it would have mapped, were it there; a server that refuses says something else.
ALLOWED_BUT_NOT_THERE = "Unable to open shared memory region"
# What Triton says, and what to do.
QUEUE_FULL = "maximum queue size"
REMEDIES = {
    QUEUE_FULL: "it is busy: try again later",
    "Stub process": "its model died, as for want of memory: restart tritonserver",
}

Answer = tuple[LabelArray, NDArray[np.float32]]


class TritonRuntime:
    """The model `anatomynet` of a Triton server: a Runtime, and a context manager that closes the connection.

    Args:
        url: HOST:PORT of the server's gRPC service, 8001 where no port is given; grpcs://HOST:PORT through TLS;
            dns:///SERVICE:PORT for all servers of a name in turn, which must serve the same model.
        shared_memory: "auto" where the server is on this machine and accepts it, "on" insists, "off" never.
        timeout_s: for one volume, its wait in the server's queue included; then the request is cancelled.
        connect_timeout_s: for each question but that: is a server there, what does it serve.

    Attributes:
        model: the ModelConfig that the served model carries.

    Raises:
        ServerError: no server there, no such model, not READY, or not one that anatomynet-export wrote.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        shared_memory: Literal["auto", "on", "off"] = "auto",
        timeout_s: float = TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self.url = url
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._insists = shared_memory == "on"
        address = _address_from_url(url)
        on_this_machine = address.is_loopback and SHARED_MEMORY_FOLDER.is_dir()
        self._shares = self._insists or (shared_memory == "auto" and on_this_machine)
        self._client = _client_of(address)
        try:
            self._version, self.model = self._served_model()
            if self._shares:
                self._unregister_abandoned_regions()
        except BaseException:
            self.close()
            raise

    @property
    def description(self) -> str:
        """One phrase for the user: "Triton 2.51.0 at localhost:8001, by shared memory"."""
        return f"Triton {self._version} at {self.url}, by {'shared memory' if self._shares else 'gRPC'}"

    def infer(self, hu: HounsfieldArray) -> Answer:
        """See Runtime; may be called from several threads at once.

        Raises:
            ServerError: the server refused, failed or went away, took longer than the time-out, or its answer does
                not fit the volume; a ServerBusyError where its queue is full.
        """
        hu = np.ascontiguousarray(hu)
        if not self._shares:
            return self._infer_sent(hu)
        try:
            return self._infer_shared(hu)
        except _NotSharedError as error:
            if self._insists:
                raise ServerError(f"{self.url} does not share memory with this process: {error}") from error
            self._shares = False  # another container, another user, a server that refuses: so it stays
            return self._infer_sent(hu)

    def is_shared_memory_open(self) -> bool:
        """Whether the server maps shared memory for whoever reaches it; right only where no other machine does."""
        from tritonclient.utils import InferenceServerException

        name = f"{REGION_PREFIX}not-there-{secrets.token_hex(8)}"
        try:
            self._client.register_system_shared_memory(name, f"/{name}", 1, client_timeout=self._connect_timeout_s)
        except InferenceServerException as error:
            return ALLOWED_BUT_NOT_THERE in str(error.message())
        self._unregister(name)
        return True

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def __enter__(self) -> "TritonRuntime":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _served_model(self) -> tuple[str, ModelConfig]:
        """The server's version, and what its model draws."""
        from tritonclient.utils import InferenceServerException

        try:
            version = self._client.get_server_metadata(client_timeout=self._connect_timeout_s).version
        except InferenceServerException as error:
            raise ServerError(
                f"no Triton server at {self.url} ({_reason(error)}): expected HOST:PORT of its gRPC service; "
                f"{START_A_SERVER}"
            ) from error
        try:
            ready = self._client.is_model_ready(MODEL_NAME, client_timeout=self._connect_timeout_s)
            served = self._client.get_model_config(MODEL_NAME, client_timeout=self._connect_timeout_s).config
        except InferenceServerException as error:
            raise ServerError(
                f"no READY model {MODEL_NAME} at {self.url} ({_reason(error)}): write it with "
                f"`anatomynet-export --fp16`, then {START_A_SERVER}"
            ) from error
        if not ready:
            raise ServerError(f"the model {MODEL_NAME} at {self.url} is not READY: wait, or read the server's log")
        if "model_config" not in served.parameters:
            raise ServerError(
                f"the model {MODEL_NAME} at {self.url} has no parameter 'model_config' in its config.pbtxt: expected "
                "one that anatomynet-export wrote"
            )
        return version, model_config_from_json(served.parameters["model_config"].string_value)

    def _infer_sent(self, hu: HounsfieldArray) -> Answer:
        from tritonclient.grpc import InferInput, InferRequestedOutput

        ct = InferInput("CT", hu.shape, "INT16")
        ct.set_data_from_numpy(hu)
        result = self._ask(ct, InferRequestedOutput("LABEL_MAP"))
        return self._checked(result.as_numpy("LABEL_MAP"), result, hu)

    def _infer_shared(self, hu: HounsfieldArray) -> Answer:
        """The CT and the label map one after the other in one region; the few confidences come by gRPC."""
        from tritonclient.grpc import InferInput, InferRequestedOutput

        ct, label_map = InferInput("CT", hu.shape, "INT16"), InferRequestedOutput("LABEL_MAP")
        name, memory = self._registered_region(hu.nbytes + hu.size)
        try:
            np.frombuffer(memory, np.int16, hu.size).reshape(hu.shape)[:] = hu
            ct.set_shared_memory(name, hu.nbytes)
            label_map.set_shared_memory(name, hu.size, hu.nbytes)
            result = self._ask(ct, label_map)
            described = result.get_output("LABEL_MAP")
            if described is None or described.datatype != "UINT8" or tuple(described.shape) != hu.shape:
                raise self._unfit("LABEL_MAP", hu)
            labels = np.frombuffer(memory, np.uint8, hu.size, hu.nbytes).reshape(hu.shape).copy()
        finally:
            if not self._unregister(name):
                # A cancelled request that still computes holds on to the region; its pages can go.
                memory.madvise(mmap.MADV_REMOVE)
        return self._checked(labels, result, hu)

    def _ask(self, ct: Any, label_map: Any) -> "InferResult":
        """One request, cancelled at the server if this is left before it is answered.

        Raises:
            ServerError: no answer in time, or an error for an answer.
        """
        from tritonclient.grpc import InferRequestedOutput

        answers: queue.SimpleQueue[tuple[InferResult | None, InferenceServerException | None]] = queue.SimpleQueue()
        call = self._client.async_infer(
            MODEL_NAME,
            [ct],
            callback=lambda result, error: answers.put((result, error)),
            outputs=[label_map, InferRequestedOutput("CONFIDENCE")],
            timeout=int(self._timeout_s * 1e6),  # in the server's queue
            client_timeout=self._timeout_s,
        )
        try:
            result, error = answers.get()
        finally:
            call.cancel()
        if result is not None:
            return result
        if error is not None and error.status() == "StatusCode.DEADLINE_EXCEEDED":
            raise ServerError(
                f"no answer from {self.url} within {self._timeout_s:g} s: its queue may be long, or its machine slow"
            ) from error
        kind = ServerBusyError if error is not None and QUEUE_FULL in error.message() else ServerError
        raise kind(f"{self.url} did not segment the volume: {_reason(error)}") from error

    def _checked(self, labels: Any, result: "InferResult", hu: HounsfieldArray) -> Answer:
        confidence = result.as_numpy("CONFIDENCE")
        if labels is None or labels.dtype != np.uint8 or labels.shape != hu.shape:
            raise self._unfit("LABEL_MAP", hu)
        if confidence is None or confidence.dtype != np.float32 or confidence.shape != (len(self.model.structures),):
            raise self._unfit("CONFIDENCE", hu)
        return labels, confidence

    def _unfit(self, output: str, hu: HounsfieldArray) -> ServerError:
        return ServerError(
            f"{output} of {self.url} does not fit a CT of {hu.shape} voxels and {len(self.model.structures)} "
            "structures: expected a model that anatomynet-export wrote"
        )

    def _registered_region(self, size: int) -> tuple[str, mmap.mmap]:
        """Memory that this process and the server have mapped, and its name at the server.

        Its file in /dev/shm is gone before a voxel is in it, so nothing stays behind however this process ends.

        Raises:
            _NotSharedError: the server did not map it, or there is too little of it.
        """
        from tritonclient.utils import InferenceServerException

        expiry = int(time.time() + self._timeout_s) + REGION_GRACE_S
        name = f"{REGION_PREFIX}{expiry}-{secrets.token_hex(8)}"
        path = SHARED_MEMORY_FOLDER / name
        try:
            path.touch(mode=0o600, exist_ok=False)
            with path.open("r+b", buffering=0) as file:
                try:
                    file.truncate(size)
                    memory = mmap.mmap(file.fileno(), size)
                    self._client.register_system_shared_memory(
                        name, f"/{name}", size, client_timeout=self._connect_timeout_s
                    )
                finally:
                    path.unlink()
                # Else a full /dev/shm (Docker's has 64 MB) would end this process at the first voxel that is too many.
                os.posix_fallocate(file.fileno(), 0, size)
        except InferenceServerException as error:
            raise _NotSharedError(_reason(error)) from error
        except OSError as error:
            self._unregister(name)
            raise _NotSharedError(f"{SHARED_MEMORY_FOLDER}: {error.strerror} for {size >> 20} MiB") from error
        return name, memory

    def _unregister(self, name: str) -> bool:
        """Whether the server has let go of a region."""
        from tritonclient.utils import InferenceServerException

        try:
            self._client.unregister_system_shared_memory(name, client_timeout=self._connect_timeout_s)
        except InferenceServerException:
            return False
        return True

    def _unregister_abandoned_regions(self) -> None:
        """Frees at the server what clients left there that were killed, or that stopped waiting."""
        from tritonclient.utils import InferenceServerException

        try:
            status = self._client.get_system_shared_memory_status(client_timeout=self._connect_timeout_s)
        except InferenceServerException:  # a server that refuses will refuse the first region too
            return
        for name in status.regions:
            expiry = name.removeprefix(REGION_PREFIX).split("-")[0]
            if name.startswith(REGION_PREFIX) and expiry.isdecimal() and int(expiry) < time.time():
                self._unregister(name)


class _NotSharedError(Exception):
    """Shared memory cannot be used with this server; gRPC can."""


def probe_local(url: str = DEFAULT_URL) -> TritonRuntime | None:
    """The server on this machine where it has a READY model `anatomynet`, else None; at once if nothing listens."""
    address = _address_from_url(url)
    try:
        socket.create_connection((address.host, address.port), timeout=PROBE_TIMEOUT_S).close()
        return TritonRuntime(url, connect_timeout_s=PROBE_TIMEOUT_S)
    except (OSError, ServerError):
        return None


@dataclass(frozen=True)
class _Address:
    """Where a server is. `host` is empty where gRPC's own name resolution (dns:///, ipv4:) finds several."""

    target: str
    host: str
    port: int
    secure: bool

    @property
    def is_loopback(self) -> bool:
        """By its form; nothing is looked up."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def _address_from_url(url: str) -> _Address:
    secure = url.startswith(TLS_SCHEME)
    target = url.removeprefix(TLS_SCHEME)
    if target.startswith(RESOLVED_SCHEMES):
        return _Address(target, "", 0, secure)
    try:
        parts = urlsplit(f"//{target}")
        host, port = parts.hostname or "", DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:  # a port that is none, a bracket that does not close
        host, port = "", 0
    if not host or "/" in target:
        raise ServerError(f"{url} is no address of a server: expected HOST:PORT of its gRPC service, as {DEFAULT_URL}")
    return _Address(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", host, port, secure)


def _client_of(address: _Address) -> "InferenceServerClient":
    """Connects only when it is asked something."""
    from tritonclient.grpc import InferenceServerClient

    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", LARGEST_MESSAGE),
        ("grpc.max_receive_message_length", LARGEST_MESSAGE),
        # Hospitals set http_proxy for everything; no proxy leads to this machine.
        ("grpc.enable_http_proxy", int(not address.is_loopback)),
        # Where a name stands for several servers, each volume goes to the next.
        ("grpc.lb_policy_name", "round_robin"),
    ]
    return InferenceServerClient(address.target, ssl=address.secure, channel_args=options)


def _reason(error: "InferenceServerException | None") -> str:
    """What the server, or gRPC, said, in one line."""
    if error is None:
        return "an empty answer"
    text = " ".join(str(error.message()).split()).removeprefix("[request id: <id_unknown>] ")
    for symptom, remedy in REMEDIES.items():
        if symptom in text:
            return f"{text}; {remedy}"
    return text.rpartition("last error: ")[2].rpartition("Failed to connect to remote host: ")[2]
