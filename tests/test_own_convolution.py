"""benchmarks/own_convolution.py sums over the convolutions that the network has."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton's compiler: a PyTorch for CUDA, or see .ci/run")

from anatomynet.engine.gpu_convolution import Kind
from anatomynet.engine.gpu_network import TensorCoreNetwork
from anatomynet.engine.gpu_operations import TorchOperations
from anatomynet.engine.network import AnatomyNet
from benchmarks.own_convolution import PLACES

OAR9_CLASSES = 10


class CountingOperations(TorchOperations):
    """Of each kind, how many kernels were prepared: one for each convolution."""

    def __init__(self) -> None:
        self.kinds: Counter[Kind] = Counter()

    def prepared(self, weight: Tensor, inward: Sequence[int]) -> Tensor:
        self.kinds[Kind(tuple(inward), len(weight))] += 1
        return super().prepared(weight, inward)


def test_places_are_the_networks() -> None:
    operations = CountingOperations()
    TensorCoreNetwork(AnatomyNet(OAR9_CLASSES).eval(), operations, torch.float32)
    assert {place.kind: place.times for place in PLACES} == operations.kinds
