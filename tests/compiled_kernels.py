"""A program: Triton's compiler makes machine code of every kernel that the network's passes ask for, without a GPU.

    python -m tests.compiled_kernels 80 90 ...     # compute capabilities, without the point

A driver that launches nothing stands where the GPU's would, so what the passes compute is worth nothing; that they
compile is. Writes a line a kernel: capability, name, bytes of machine code. It must not run with TRITON_INTERPRET=1.
"""

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from anatomynet.engine.gpu_kernels import KernelOperations
from anatomynet.engine.gpu_network import TensorCoreNetwork
from anatomynet.engine.gpu_operations import Shape, rows_of
from tests.random_network import random_network

SHARED_BYTES = 99 * 1024  # of a block, on the GPUs that have least
REGISTERS, SPILLS, THREADS = 32, 0, 1024


class Driver(DriverBase):  # type: ignore[misc]
    """Of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda _: {"max_shared_mem": SHARED_BYTES}
        )

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        """What would launch a kernel."""
        return lambda *_, **__: None

    def _load(self, name: str, binary: bytes, *_: Any) -> tuple[int, int, int, int, int]:
        sys.stdout.write(f"{self.capability} {name} {len(binary)}\n")
        return 0, 0, REGISTERS, SPILLS, THREADS

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a number of its own, or what was compiled for another would do

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, _type: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class Passes(KernelOperations):
    """PyTorch's convolutions leave channels last on a GPU, not on a CPU."""

    def convolved(self, inputs: Sequence[Tensor], shape: Shape, weight: Tensor) -> Tensor:
        return super().convolved(inputs, shape, weight).contiguous()


def main(capabilities: list[int]) -> None:
    """The whole network, in FP16, once for each."""
    for capability in capabilities:
        driver.set_active(Driver(capability))
        operations = Passes()
        with torch.inference_mode():
            form = TensorCoreNetwork(random_network(), operations, torch.float16)
            blocks = form.blocks_of(torch.zeros(1, 1, 16, 16, 16))
            logits = form.logits(form.features(blocks), blocks)
            labels, top = (of.view(16, 16, 16) for of in operations.winners(rows_of(logits), form.classes))
            operations.border_confidence(labels, top, form.classes)


if __name__ == "__main__":
    main([int(capability) for capability in sys.argv[1:]])
