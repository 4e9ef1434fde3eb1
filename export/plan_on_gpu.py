"""A plan, run on this machine's GPU: what the parity gate holds against the checkpoint before the plan is served.

It takes an NVIDIA GPU, TensorRT, and a PyTorch with CUDA for the memory.
"""

from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from anatomynet.engine.contract import CONFIDENCE
from anatomynet.engine.errors import ExportError
from anatomynet.engine.volume import LabelArray


class PlanOnGpu:
    """A plan loaded on the GPU: network_input -> LABELS, CONFIDENCE; the middle of a ComposedRuntime.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx_bindings` that built it.

    Raises:
        ExportError: a plan that TensorRT does not load.
    """

    def __init__(self, trt: ModuleType, plan: bytes) -> None:
        self._trt = trt
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ExportError(
                f"TensorRT {trt.__version__} does not load the plan that it built; its messages are above"
            )
        self._context = self._engine.create_execution_context()
        self.description = f"the plan in TensorRT {trt.__version__}"

    def layer_information(self) -> str:
        """JSON of the engine inspector: what the built layers are, and what they read at the plan's typical size.

        Raises:
            ExportError: TensorRT takes no such size.
        """
        # Of a plan for many sizes the inspector tells no tensor's format until it is given one.
        _, typical, _ = self._engine.get_tensor_profile_shape("network_input", 0)
        if not self._context.set_input_shape("network_input", typical):
            raise ExportError(f"TensorRT does not take its plan's own size {tuple(typical)}; its messages are above")
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def __call__(self, network_input: NDArray[np.float16]) -> tuple[LabelArray, NDArray[np.float32]]:
        """float16 [1, 1, pz, py, px] -> LABELS, uint8 [pz, fy, fx], and CONFIDENCE, float32 [n].

        Raises:
            ExportError: the GPU did not compute it.
        """
        import torch

        given = torch.from_numpy(network_input).cuda()
        self._context.set_input_shape("network_input", tuple(given.shape))
        labels, confidence = (
            torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device="cuda")
            for name, dtype in (("LABELS", torch.uint8), (CONFIDENCE, torch.float32))
        )
        for name, tensor in (("network_input", given), ("LABELS", labels), (CONFIDENCE, confidence)):
            self._context.set_tensor_address(name, tensor.data_ptr())
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise ExportError(
                f"TensorRT did not compute a network_input of {tuple(given.shape)}; its messages are above"
            )
        stream.synchronize()
        return labels.cpu().numpy(), confidence.cpu().numpy()
