"""TritonRegionFinder: the model `anatomynet_region` of a Triton server; TritonRuntime brings it where it is READY.

A coarse CT is a few hundred kilobytes, so it goes by gRPC, to the first server that answers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anatomynet.client.failures import reason_of, unknown_model
from anatomynet.engine.contract import BOX, CT_COARSE, REGION_CONFIG_KEY, REGION_NAME
from anatomynet.engine.errors import ModelError, ServerError
from anatomynet.engine.region import RegionConfig, region_config_from_json
from anatomynet.engine.volume import HounsfieldArray

if TYPE_CHECKING:
    from tritonclient.grpc import InferenceServerClient

# Tells a proxy, which sees no model's name, that this is no volume: deploy/nginx counts those in a round of their own.
SMALL_REQUEST = {"anatomynet-small": "1"}


def region_config_of(client: "InferenceServerClient", timeout_s: float) -> RegionConfig | None:
    """What the region finder of a server was trained for; None where it has none that is READY.

    Raises:
        ServerError: one that anatomynet-export did not write, or a newer one than is known here.
    """
    from tritonclient.utils import InferenceServerException

    try:
        if not client.is_model_ready(REGION_NAME, client_timeout=timeout_s):
            return None
        parameters = client.get_model_config(REGION_NAME, client_timeout=timeout_s).config.parameters
    except InferenceServerException:
        return None
    if REGION_CONFIG_KEY not in parameters:
        return None
    try:
        return region_config_from_json(parameters[REGION_CONFIG_KEY].string_value)
    except ModelError as error:
        raise unknown_model(REGION_NAME, error) from error


def common_region_finder(
    clients: Sequence["InferenceServerClient"], *, timeout_s: float
) -> "TritonRegionFinder | None":
    """The region finder of servers that all have the same; None otherwise, for the box must not hang on the server.

    Raises:
        ServerError: one that anatomynet-export did not write, or a newer one than is known here.
    """
    configs = [region_config_of(client, timeout_s) for client in clients]
    if not configs or configs[0] is None or any(config != configs[0] for config in configs):
        return None
    return TritonRegionFinder(clients, configs[0], timeout_s=timeout_s)


class TritonRegionFinder:
    """The region finder that some servers share; a RegionFinder.

    Args:
        clients: one a server; each has it READY.
        config: what it was trained for.
        timeout_s: for one box, at each server.
    """

    def __init__(self, clients: Sequence["InferenceServerClient"], config: RegionConfig, *, timeout_s: float) -> None:
        self._clients = clients
        self.config = config
        self._timeout_s = timeout_s

    def find(self, coarse: HounsfieldArray) -> NDArray[np.int64]:
        """See RegionFinder; may be called from several threads at once.

        Raises:
            ServerError: no server answered.
        """
        from tritonclient.grpc import InferInput
        from tritonclient.utils import InferenceServerException

        ct = InferInput(CT_COARSE, coarse.shape, "INT16")
        ct.set_data_from_numpy(np.ascontiguousarray(coarse))
        reason = "no server"
        for client in self._clients:
            if region_config_of(client, self._timeout_s) != self.config:
                reason = "not READY, or another than at the start"
                continue
            try:
                result = client.infer(REGION_NAME, [ct], headers=SMALL_REQUEST, client_timeout=self._timeout_s)
            except InferenceServerException as error:
                reason = reason_of(error)
                continue
            box: NDArray[np.int64] | None = result.as_numpy(BOX)
            if box is not None:
                return box
        raise ServerError(f"{REGION_NAME} did not answer ({reason}): --whole-volume does without it")
