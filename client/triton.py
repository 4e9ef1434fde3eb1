"""TritonRuntime: Triton servers as one runtime. The middle of `segment`, where the network runs elsewhere.

Servers fail, and a study is not lost by it: what may go better is asked again, of the next server at once and of the
same one after a pause, until the time for the volume is over. What would fail again is told at once.
"""

import itertools
import random
import socket
import time
from collections.abc import Callable, Iterator

from anatomynet.client.access import NO_ACCESS, Access
from anatomynet.client.address import DEFAULT_URL, address_from_url
from anatomynet.client.failures import AttemptError, Outlook
from anatomynet.client.triton_region import common_region_finder
from anatomynet.client.triton_server import Answer, SharedMemory, TritonServer
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import ServerError
from anatomynet.engine.runtime import check_input
from anatomynet.engine.volume import HounsfieldArray

# For one volume: a full queue of whole volumes on two CPU cores.
TIMEOUT_S = 120.0
CONNECT_TIMEOUT_S = 5.0
# On this machine who listens answers soon, or is no Triton.
PROBE_TIMEOUT_S = 1.0
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0
# So long is a server that failed asked last.
SHUNNED_S = 30.0


class TritonRuntime:
    """The model `anatomynet` of one or more Triton servers: a Runtime, and a context manager that closes connections.

    Volumes go to the servers in turn; all must serve the same checkpoint.

    Args:
        urls: of each server's gRPC service: HOST:PORT, 8001 where no port is given; https://HOST:PORT or
            grpcs://HOST:PORT through TLS; dns:///SERVICE:PORT for all servers of a name in turn.
        shared_memory: "auto" where the server is on this machine and accepts it, "on" insists, "off" never.
        timeout_s: for one volume, every try and its wait in servers' queues included; then the request is cancelled.
        connect_timeout_s: for each question but that: is a server there, what does it serve.
        wait_s: for a first server that is starting.
        retries: False asks each server once, at the start and for a volume.
        access: what opens servers behind a TLS proxy.
        tell: gets one short line for the user whenever something is asked again.

    Attributes:
        model: the ModelConfig that the served model carries.
        region_finder: the servers' own; None where not all have the same one READY.

    Raises:
        ServerError: no server there, no such model, not READY, not one that anatomynet-export wrote, or two of them.
    """

    def __init__(
        self,
        *urls: str,
        shared_memory: SharedMemory = "auto",
        timeout_s: float = TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        wait_s: float = 0.0,
        retries: bool = True,
        access: Access = NO_ACCESS,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._timeout_s = timeout_s
        self._retries = retries
        self._tell = tell
        self._turn = itertools.count(random.randrange(1 << 16))  # many clients of one volume each spread too
        self._failed_at: dict[TritonServer, float] = {}
        self._servers: list[TritonServer] = []
        try:
            for url in dict.fromkeys(urls or (DEFAULT_URL,)):
                self._servers.append(
                    TritonServer(url, shared_memory=shared_memory, answer_timeout_s=connect_timeout_s, access=access)
                )
            self.model = self._connect(wait_s if retries else 0.0)
            there = [server.client for server in self._servers if server.version]
            self.region_finder = common_region_finder(there, timeout_s=connect_timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def description(self) -> str:
        """One phrase for the user: "Triton 2.51.0 at localhost:8001, by shared memory"."""
        versions = "/".join(dict.fromkeys(server.version for server in self._servers if server.version))
        urls = " and ".join(server.url for server in self._servers)
        ways = dict.fromkeys("shared memory" if server.shares else "gRPC" for server in self._servers)
        without = "" if self.region_finder else ", without a region finder"
        return f"Triton {versions} at {urls}, by {' or '.join(ways)}{without}"

    def infer(self, hu: HounsfieldArray) -> Answer:
        """See Runtime; may be called from several threads at once.

        Raises:
            GeometryError: an array of another type, too small, or larger than a server takes; nothing is sent.
            ServerError: no server answered in time, one refused a volume that none would take, an answer does not fit
                the volume, or the model changed meanwhile; a ServerBusyError where a queue was full to the end.
        """
        model = self.model  # another thread may find another one meanwhile
        check_input(hu, model)  # copied into shared memory, another type's numbers would wrap around
        self.check_size(hu.shape)
        deadline = time.monotonic() + self._timeout_s
        given_up: set[TritonServer] = set()
        for pause_s in _pauses():
            servers = self._servers_in_turn(given_up)
            for server, untried in zip(servers, range(len(servers), 0, -1), strict=True):
                try:
                    # One that hangs must leave time for the others.
                    return self._attempt(server, hu, model, max(deadline - time.monotonic(), 0.001) / untried)
                except AttemptError as error:
                    failure = error
                self._failed_at[server] = time.monotonic()
                if failure.outlook is Outlook.NEVER:
                    raise failure.as_server_error() from failure
                if failure.outlook is Outlook.ELSEWHERE or not self._retries:
                    given_up.add(server)
                if untried > 1:
                    self._tell(f"{server.url}: {failure.reason}; going on to the next server")
            if len(given_up) == len(self._servers) or time.monotonic() + pause_s > deadline:
                raise failure.as_server_error() from failure
            self._tell(f"{server.url}: {failure.reason}; trying again in {pause_s:.1f} s")
            time.sleep(pause_s)
        raise AssertionError("pauses have no end")

    def check_size(self, shape: tuple[int, ...]) -> None:
        """Whether all servers take a CT of this shape (z, y, x): volumes go to them in turn.

        Raises:
            GeometryError: one does not.
        """
        for server in self._servers:
            if server.size_limit:
                server.size_limit.check(shape, self.model)

    def is_shared_memory_open(self) -> bool:
        """Whether a server maps shared memory for whoever reaches it; right only where no other machine does."""
        return any(server.maps_regions() for server in self._servers)

    def close(self) -> None:
        """Ends the connections."""
        for server in self._servers:
            server.close()

    def __enter__(self) -> "TritonRuntime":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _connect(self, wait_s: float) -> ModelConfig:
        """What the servers that are there serve; one is enough."""
        deadline = time.monotonic() + wait_s
        for pause_s in _pauses():
            models, failures = {}, {}
            for server in self._servers:
                try:
                    models[server] = server.connect()
                except AttemptError as error:
                    failures[server] = error
            if models:
                for server, failure in failures.items():
                    self._failed_at[server] = time.monotonic()
                    self._tell(f"{server.url}: {failure.reason}; going on without it")
                return _common_model(models)
            server, failure = next(iter(failures.items()))
            passing = any(failure.outlook is Outlook.LATER for failure in failures.values())
            if not passing or time.monotonic() + pause_s > deadline:
                raise failure.as_server_error() from failure
            left_s = deadline - time.monotonic()
            self._tell(f"{server.url}: {failure.reason}; trying again, for at most {left_s:.0f} s")
            time.sleep(pause_s)
        raise AssertionError("pauses have no end")

    def _attempt(self, server: TritonServer, hu: HounsfieldArray, model: ModelConfig, timeout_s: float) -> Answer:
        if not server.version:  # it was not there at the start
            server.connect()
            self._check_model(server, model)
        answer = server.infer(hu, structures=len(model.structures), timeout_s=timeout_s)
        # Asked after, since only then is it sure which model answered: it may have been loaded anew.
        self._check_model(server, model)
        return answer

    def _check_model(self, server: TritonServer, before: ModelConfig) -> None:
        """Whether a server serves `before`, which the volume is for.

        Raises:
            ServerError: it does not; later volumes are for its new model, where all servers have it and what was
                settled for the one before holds for it.
        """
        now = server.ask_model()
        if now == before:
            return
        models = {server: now}
        for other in self._servers:
            if other is not server:
                try:
                    models[other] = other.ask_model()
                except AttemptError:  # it is not there
                    continue
        model = _common_model(models)
        if _settles(model) == _settles(before):
            self.model = model
        raise ServerError(
            f"{server.url} has changed from checkpoint {_short(before)} to {_short(now)} meanwhile: segment the study "
            "again"
        )

    def _servers_in_turn(self, without: set[TritonServer]) -> list[TritonServer]:
        """All but those given up, the next one first, and last those that failed a short while ago."""
        first, recently = next(self._turn) % len(self._servers), time.monotonic() - SHUNNED_S
        servers = self._servers[first:] + self._servers[:first]
        servers.sort(key=lambda server: self._failed_at.get(server, recently) > recently)
        return [server for server in servers if server not in without]


def probe_local(url: str = DEFAULT_URL, *, retries: bool = True) -> TritonRuntime | None:
    """The server on this machine where it has a READY model `anatomynet`, else None; at once if nothing listens."""
    address = address_from_url(url)
    try:
        socket.create_connection((address.host, address.port), timeout=PROBE_TIMEOUT_S).close()
        return TritonRuntime(url, connect_timeout_s=PROBE_TIMEOUT_S, retries=retries)
    except (OSError, ServerError):
        return None


def _common_model(models: dict[TritonServer, ModelConfig]) -> ModelConfig:
    """What all servers serve.

    Raises:
        ServerError: not the same.
    """
    (first, model), *others = models.items()
    for server, other in others:
        if other != model:
            raise ServerError(
                f"{first.url} serves checkpoint {_short(model)}, {server.url} {_short(other)}: expected the same model "
                "on all servers"
            )
    return model


def _settles(model: ModelConfig) -> tuple[object, ...]:
    """What is asked of a model once, for all volumes: its name, its structures, and those that no patient taught."""
    return model.name, model.structures, model.unvalidated


def _short(model: ModelConfig) -> str:
    return f"{model.checkpoint_sha256[:12]} of {model.name}"


def _pauses() -> Iterator[float]:
    """Seconds between one round and the next: doubled up to a limit, and uneven so that clients do not come at once."""
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s * random.uniform(0.5, 1.0)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
