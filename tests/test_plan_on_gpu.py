"""export/plan_on_gpu.py, as far as it goes without a GPU: how a built plan is asked which precision its layers got."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from anatomynet.engine.errors import ExportError
from anatomynet.export.plan import check_engine_precision
from anatomynet.export.plan_on_gpu import PlanOnGpu

PROFILE = ((1, 1, 8, 8, 8), (1, 1, 178, 128, 128), (1, 1, 546, 128, 128))


class Context:
    """An execution context: takes shapes inside the profile."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] | None = None

    def set_input_shape(self, name: str, shape: Any) -> bool:
        fits = name == "network_input" and all(
            low <= side <= high for low, side, high in zip(PROFILE[0], shape, PROFILE[2], strict=True)
        )
        self.shape = tuple(shape) if fits else self.shape
        return fits


class Inspector:
    """As TensorRT's documentation has it: tensors' formats of a plan for many sizes are told for one size alone."""

    execution_context: Context | None = None

    def get_engine_information(self, form: str) -> str:
        assert form == "JSON"
        told = self.execution_context is not None and self.execution_context.shape is not None
        inputs = [{"Name": "x", "Format/Datatype": "Half" if told else "N/A due to dynamic shapes"}]
        return json.dumps({"Layers": [{"Name": "stem", "LayerType": "CaskConvolution", "Inputs": inputs}]})


class Engine:
    def create_execution_context(self) -> Context:
        return Context()

    def create_engine_inspector(self) -> Inspector:
        return Inspector()

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        assert (name, profile) == ("network_input", 0)
        return PROFILE


def tensorrt(engine: Engine | None) -> Any:
    class Logger:
        ERROR = 0

        def __init__(self, severity: int) -> None: ...

    return SimpleNamespace(
        __version__="10.13.0.35",
        Logger=Logger,
        LayerInformationFormat=SimpleNamespace(JSON="JSON"),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
    )


def test_the_inspector_is_given_a_size() -> None:
    """Without one it tells no format, and a plan in FP32 would look like one in FP16."""
    assert check_engine_precision(PlanOnGpu(tensorrt(Engine()), b"a plan").layer_information()) == 1


def test_a_plan_that_is_not_loaded() -> None:
    with pytest.raises(ExportError, match=r"TensorRT 10\.13\.0\.35 does not load the plan"):
        PlanOnGpu(tensorrt(None), b"a plan")
