"""One Triton server: what it serves, and one question to it. TritonRuntime asks one after the other.

A volume crosses to a server on this machine in shared memory, to any other by gRPC. Only voxels, the model's name and
a random one go on the wire.
"""

import queue
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from anatomynet.client.access import NO_ACCESS, Access
from anatomynet.client.address import address_from_url
from anatomynet.client.channel import open_client
from anatomynet.client.failures import (
    DEAD_MODEL,
    LOST_REGION,
    MEMORY_FULL,
    AttemptError,
    Outlook,
    attempt_error,
    unknown_model,
)
from anatomynet.client.region_keeper import RegionKeeper, free_kept_regions
from anatomynet.client.shared_memory import (
    SHARED_MEMORY_FOLDER,
    NotSharedError,
    free_abandoned_regions,
    maps_regions,
)
from anatomynet.engine.config import ModelConfig, model_config_from_json
from anatomynet.engine.contract import CONFIDENCE, CONFIG_KEY, CT, LABEL_MAP, MODEL_NAME
from anatomynet.engine.errors import ModelError, ServerError
from anatomynet.engine.limits import SizeLimit, size_limit_from_parameters
from anatomynet.engine.volume import HounsfieldArray, LabelArray

if TYPE_CHECKING:
    from tritonclient.grpc import InferenceServerClient, InferResult
    from tritonclient.utils import InferenceServerException

START_A_SERVER = "start one with `tritonserver --model-repository triton_repo`"

SharedMemory = Literal["auto", "on", "off"]
Answer = tuple[LabelArray, NDArray[np.float32]]


class TritonServer:
    """The model `anatomynet` of one server. Nothing is asked before it is told to.

    Args:
        url: see address_from_url.
        shared_memory: see TritonRuntime.
        answer_timeout_s: for each question but a volume.
        access: what opens it behind a TLS proxy.

    Attributes:
        url: as given.
        version: the server's, once it has answered.
        shares: whether volumes go through shared memory.
        size_limit: the largest CT that it takes; None before it has answered.

    Raises:
        ServerError: no address, or one that does not fit what else is asked for.
    """

    def __init__(
        self, url: str, *, shared_memory: SharedMemory, answer_timeout_s: float, access: Access = NO_ACCESS
    ) -> None:
        address = address_from_url(url)
        self.url = url
        self.version = ""
        self._insists = shared_memory == "on"
        self._may_be_several = address.may_be_several
        if self._insists and self._may_be_several:
            raise ServerError(
                f"{url} may stand for several servers, on any machine, and memory is shared with one on this: expected "
                "--shared-memory auto or off"
            )
        on_this_machine = address.is_loopback and not self._may_be_several and SHARED_MEMORY_FOLDER.is_dir()
        self.shares = self._insists or (shared_memory == "auto" and on_this_machine)
        self._answer_timeout_s = answer_timeout_s
        self._client = open_client(address, access)
        # A question follows each volume. Were both in one round, a client of two servers would bring all its volumes
        # to one of them.
        self._volume_client = open_client(address, access) if self._may_be_several else self._client
        self._regions = RegionKeeper(self._client, answer_timeout_s)
        self._served: tuple[str, ModelConfig] | None = None
        self.size_limit: SizeLimit | None = None

    @property
    def client(self) -> "InferenceServerClient":
        """The connection, for questions to its other models."""
        return self._client

    def close(self) -> None:
        """Ends the connection."""
        self._regions.free_kept()
        self._client.close()
        self._volume_client.close()

    def connect(self) -> ModelConfig:
        """Whether a server is there and its model READY; what that draws.

        Raises:
            AttemptError: no server there, no such model, or not READY.
            ServerError: a model that anatomynet-export did not write.
        """
        from tritonclient.utils import InferenceServerException

        try:
            version = self._client.get_server_metadata(client_timeout=self._answer_timeout_s).version
        except InferenceServerException as error:
            raise attempt_error(
                error,
                f"no Triton server at {self.url}",
                f": expected HOST:PORT of its gRPC service; {START_A_SERVER}",
            ) from error
        model = self.ask_model()
        try:
            ready = self._client.is_model_ready(MODEL_NAME, client_timeout=self._answer_timeout_s)
        except InferenceServerException as error:
            raise attempt_error(error, f"no READY model {MODEL_NAME} at {self.url}") from error
        if not ready:
            message = f"the model {MODEL_NAME} at {self.url} is not READY: wait, or read the server's log"
            raise AttemptError(message, reason="not READY", outlook=Outlook.LATER)
        if self.shares:
            free_abandoned_regions(self._client, self._answer_timeout_s)
        self._begin_to_connect_for_volumes()
        self.version = version  # last: who has one can be asked to draw
        return model

    def _begin_to_connect_for_volumes(self) -> None:
        """To each server of the name, while the study is read.

        The first request of a connection goes to the server that is reached first, only later ones to any: were that
        request the volume, all clients of one volume would go to the server that is nearest to them.
        """
        from tritonclient.utils import InferenceServerException

        if self._volume_client is not self._client:
            with suppress(InferenceServerException):  # told by the volume, should it still be so
                self._volume_client.is_server_live(client_timeout=self._answer_timeout_s)

    def ask_model(self) -> ModelConfig:
        """What the served model draws; it may have been loaded anew since the last time.

        Raises:
            AttemptError: no server there, or no such model.
            ServerError: a model that anatomynet-export did not write, or a newer one than is known here.
        """
        from tritonclient.utils import InferenceServerException

        try:
            served = self._client.get_model_config(MODEL_NAME, client_timeout=self._answer_timeout_s).config
        except InferenceServerException as error:
            raise attempt_error(
                error,
                f"no READY model {MODEL_NAME} at {self.url}",
                f": write it with `anatomynet-export --fp16`, then {START_A_SERVER}",
            ) from error
        if CONFIG_KEY not in served.parameters:
            raise ServerError(
                f"the model {MODEL_NAME} at {self.url} has no parameter '{CONFIG_KEY}' in its config.pbtxt: expected "
                "one that anatomynet-export wrote"
            )
        parameters = {key: value.string_value for key, value in served.parameters.items()}
        text = parameters[CONFIG_KEY]
        try:
            if self._served is None or self._served[0] != text:
                self._served = (text, model_config_from_json(text))
            self.size_limit = size_limit_from_parameters(parameters, self._served[1])
        except ModelError as error:  # the server's fault: another may do, or the embedded engine
            raise unknown_model(f"{MODEL_NAME} at {self.url}", error) from error
        return self._served[1]

    def maps_regions(self) -> bool:
        """Whether it would map shared memory for this client."""
        return maps_regions(self._client, self._answer_timeout_s)

    def infer(self, hu: HounsfieldArray, *, structures: int, timeout_s: float) -> Answer:
        """One volume, once; may be called from several threads at once.

        Args:
            hu: int16 (z, y, x); see Runtime.
            structures: how many the answer should have a confidence of.
            timeout_s: its wait in the server's queue included; then it is cancelled there.

        Raises:
            AttemptError: the server refused, failed or went away, or took longer than the time-out.
            ServerError: shared memory was insisted upon; the answer does not fit the volume.
        """
        deadline = time.monotonic() + timeout_s
        if self.shares:
            try:
                return self._infer_shared(hu, structures, timeout_s)
            except NotSharedError as error:
                if self._insists:
                    raise ServerError(f"{self.url} does not share memory with this process: {error}") from error
                self.shares = False  # another container, another user, a server that refuses: so it stays
        return self._infer_sent(hu, structures, max(deadline - time.monotonic(), 0.001))

    def _infer_sent(self, hu: HounsfieldArray, structures: int, timeout_s: float) -> Answer:
        from tritonclient.grpc import InferInput, InferRequestedOutput

        ct = InferInput(CT, hu.shape, "INT16")
        ct.set_data_from_numpy(hu)
        result = self._ask(ct, InferRequestedOutput(LABEL_MAP), timeout_s)
        labels = result.as_numpy(LABEL_MAP)
        if labels is None or labels.dtype != np.uint8 or labels.shape != hu.shape:
            raise self._unfit(LABEL_MAP, hu, structures)
        return labels, self._confidence(result, hu, structures)

    def _infer_shared(self, hu: HounsfieldArray, structures: int, timeout_s: float) -> Answer:
        """Once more where a kept region may be why it failed: it took the room, or its server has been restarted."""
        deadline = time.monotonic() + timeout_s
        try:
            return self._infer_in_region(hu, structures, timeout_s)
        except NotSharedError:
            if not free_kept_regions():
                raise
        except AttemptError as error:
            if LOST_REGION not in error.reason:
                raise
            self._regions.free_kept()  # lost too
        return self._infer_in_region(hu, structures, max(deadline - time.monotonic(), 0.001))

    def _infer_in_region(self, hu: HounsfieldArray, structures: int, timeout_s: float) -> Answer:
        """The CT and the label map one after the other in one region; the few confidences come by gRPC."""
        from tritonclient.grpc import InferInput, InferRequestedOutput

        ct, label_map = InferInput(CT, hu.shape, "INT16"), InferRequestedOutput(LABEL_MAP)
        with self._regions.region_for(hu.shape, timeout_s=timeout_s) as region:
            region.write(hu)
            ct.set_shared_memory(region.name, region.hu_bytes)
            label_map.set_shared_memory(region.name, region.label_bytes, region.hu_bytes)
            try:
                result = self._ask(ct, label_map, timeout_s)
            except AttemptError as error:
                if MEMORY_FULL in error.reason:  # by gRPC there is room for it, without the region
                    raise NotSharedError(error.reason) from error
                raise
            described = result.get_output(LABEL_MAP)
            if described is None or described.datatype != "UINT8" or tuple(described.shape) != hu.shape:
                raise self._unfit(LABEL_MAP, hu, structures)
            labels = region.read_labels()
        return labels, self._confidence(result, hu, structures)

    def _ask(self, ct: Any, label_map: Any, timeout_s: float) -> "InferResult":
        """One request, cancelled at the server if this is left before it is answered.

        Raises:
            AttemptError: no answer in time, or an error for an answer.
        """
        from tritonclient.grpc import InferRequestedOutput

        answers: queue.SimpleQueue[tuple[InferResult | None, InferenceServerException | None]] = queue.SimpleQueue()
        call = self._volume_client.async_infer(
            MODEL_NAME,
            [ct],
            callback=lambda result, error: answers.put((result, error)),
            outputs=[label_map, InferRequestedOutput(CONFIDENCE)],
            timeout=int(timeout_s * 1e6),  # in the server's queue
            client_timeout=timeout_s,
        )
        try:
            result, error = answers.get()
        finally:
            call.cancel()
        if result is not None:
            return result
        if error is not None and error.status() == "StatusCode.DEADLINE_EXCEEDED":
            within = f"within {round(timeout_s, 1):g} s"
            raise AttemptError(
                f"no answer from {self.url} {within}: its queue may be long, or its machine slow",
                reason=f"no answer {within}",
                outlook=Outlook.ELSEWHERE,
            ) from error
        # No local name for it: a frame that its own exception holds would keep the region's memory.
        raise self._not_segmented(error) from error

    def _not_segmented(self, error: "InferenceServerException | None") -> AttemptError:
        failure = attempt_error(error, f"{self.url} did not segment the volume")
        if self._may_be_several and DEAD_MODEL in failure.reason:  # the next call reaches another
            failure.outlook = Outlook.LATER
        return failure

    def _confidence(self, result: "InferResult", hu: HounsfieldArray, structures: int) -> NDArray[np.float32]:
        confidence: NDArray[np.float32] | None = result.as_numpy(CONFIDENCE)
        if confidence is None or confidence.dtype != np.float32 or confidence.shape != (structures,):
            raise self._unfit(CONFIDENCE, hu, structures)
        return confidence

    def _unfit(self, output: str, hu: HounsfieldArray, structures: int) -> ServerError:
        return ServerError(
            f"{output} of {self.url} does not fit a CT of {hu.shape} voxels and {structures} structures: expected a "
            "model that anatomynet-export wrote"
        )
