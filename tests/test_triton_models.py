"""export/triton_models.py: what every config.pbtxt says, read by Triton's own protobuf."""

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format

from anatomynet import __version__
from anatomynet.engine.config import ModelConfig, load_config, model_config_from_json
from anatomynet.engine.limits import largest_slices, largest_voxels
from anatomynet.engine.runtime import CUDA_PROVIDER, PROVIDER_OPTIONS
from anatomynet.export.triton_models import (
    COMMON_SHAPES,
    LARGEST_QUEUE,
    PlanFile,
    TritonModel,
    onnxruntime_model,
    python_model,
    tensorrt_models,
)

model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")

CONFIGS = ("openkbp7", "oar9")
VOLUME = [-1, -1, -1]
NETWORK_VOLUME = [1, 1, -1, -1, -1]
ONNX, PLAN = Path("anatomynet.onnx"), Path("openkbp7-fp16-trt10.13.0.35-sm90-nvidia-h100-80gb-hbm3.plan")
BACKENDS = {
    "python": ("anatomynet",),
    "onnxruntime": ("anatomynet",),
    "tensorrt": ("anatomynet", "anatomynet_prepare", "anatomynet_plan", "anatomynet_finish"),
}
# No timing at every new size, no doubled memory, no TF32.
CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}


def models_of(backend: str, config: ModelConfig) -> dict[str, TritonModel]:
    plan = PlanFile(PLAN, "10.13.0.35", "9.0", "NVIDIA H100 80GB HBM3", (largest_slices(config), 512, 512))
    models = {
        "python": (python_model(config, [ONNX]),),
        "onnxruntime": (onnxruntime_model(config, ONNX),),
        "tensorrt": tensorrt_models(config, prepare=ONNX, plan=plan, finish=ONNX),
    }
    return {model.name: model for model in models[backend]}


def parsed(model: TritonModel) -> Any:
    return text_format.Parse(model.config_text, model_config_pb2.ModelConfig())


def tensors(values: Any) -> list[tuple[str, str, list[int]]]:
    return [(t.name, model_config_pb2.DataType.Name(t.data_type), list(t.dims)) for t in values]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_contract(backend: str, name: str) -> None:
    """Whatever runs behind it."""
    config, _ = load_config(name)
    models = models_of(backend, config)
    assert tuple(models) == BACKENDS[backend]
    assert all(parsed(model).name == key and parsed(model).max_batch_size == 0 for key, model in models.items())
    served = parsed(models["anatomynet"])
    assert (served.platform if backend == "tensorrt" else served.backend) == {"tensorrt": "ensemble"}.get(
        backend, backend
    )
    assert tensors(served.input) == [("CT", "TYPE_INT16", VOLUME)]
    assert tensors(served.output) == [
        ("LABEL_MAP", "TYPE_UINT8", VOLUME),
        ("CONFIDENCE", "TYPE_FP32", [len(config.structures)]),
    ]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_model_config_travels(backend: str, name: str) -> None:
    config, _ = load_config(name)
    served = parsed(models_of(backend, config)["anatomynet"])
    parameters = {key: value.string_value for key, value in served.parameters.items()}
    assert model_config_from_json(parameters["model_config"]) == config
    assert parameters["structures"].split(",") == list(config.structures)
    assert parameters["in_plane_stride"] == str(config.in_plane_stride)
    assert [float(mm) for mm in parameters["smallest_spacing_mm_xyz"].split()] == list(config.smallest_spacing)
    assert parameters["largest_voxels"] == str(largest_voxels(config))
    assert parameters["anatomynet_version"] == __version__


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_volume_at_a_time_and_a_bounded_queue(backend: str) -> None:
    for model in models_of(backend, load_config("openkbp7")[0]).values():
        config = parsed(model)
        assert not config.response_cache.enable
        if config.platform == "ensemble":
            continue
        (group,) = config.instance_group
        assert group.count == 1
        policy = config.dynamic_batching.default_queue_policy
        assert policy.max_queue_size == LARGEST_QUEUE
        assert policy.default_timeout_microseconds > 0
        assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT


def test_python_warms_up_small() -> None:
    (warm_up,) = parsed(models_of("python", load_config("openkbp7")[0])["anatomynet"]).model_warmup
    assert list(warm_up.inputs["CT"].dims) == [64, 256, 256]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_gpus_warm_up_at_the_common_sizes(backend: str, name: str) -> None:
    config, _ = load_config(name)
    stride = config.in_plane_stride
    for model in models_of(backend, config).values():
        described = parsed(model)
        if described.platform == "ensemble":
            continue
        kinds = {tensor.name: tensor.data_type for tensor in described.input}
        for warm_up, (z, y, x) in zip(described.model_warmup, COMMON_SHAPES, strict=True):
            assert {key: value.data_type for key, value in warm_up.inputs.items()} == kinds
            for key, value in warm_up.inputs.items():
                network = [1, 1, z, y // stride, x // stride]
                assert list(value.dims) == (network if key == "network_input" else [z, y, x])
                assert all(side % 2 == 0 for side in value.dims[2:])


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_gpus_compute_onnx_as_the_embedded_runtime_does(backend: str) -> None:
    models = [parsed(model) for model in models_of(backend, load_config("openkbp7")[0]).values()]
    served_by_onnxruntime = [model for model in models if model.backend == "onnxruntime"]
    assert served_by_onnxruntime
    for model in served_by_onnxruntime:
        (accelerator,) = model.optimization.execution_accelerators.gpu_execution_accelerator
        assert accelerator.name == "cuda"
        assert dict(accelerator.parameters) == CUDA_OPTIONS == PROVIDER_OPTIONS[CUDA_PROVIDER]


def test_the_ensembles_tensors_fit() -> None:
    models = {name: parsed(model) for name, model in models_of("tensorrt", load_config("openkbp7")[0]).items()}
    available = {t.name: (t.data_type, list(t.dims)) for t in models["anatomynet"].input}
    for step in models["anatomynet"].ensemble_scheduling.step:
        called = models[step.model_name]
        inputs = {t.name: (t.data_type, list(t.dims)) for t in called.input}
        assert inputs == {key: available[value] for key, value in step.input_map.items()}
        outputs = {t.name: (t.data_type, list(t.dims)) for t in called.output}
        assert set(outputs) == set(step.output_map)
        available |= {value: outputs[key] for key, value in step.output_map.items()}
    for tensor in models["anatomynet"].output:
        assert available[tensor.name] == (tensor.data_type, list(tensor.dims))


def test_the_plan_is_named_after_what_runs_it() -> None:
    config, _ = load_config("openkbp7")
    models = models_of("tensorrt", config)
    plan = parsed(models["anatomynet_plan"])
    assert plan.backend == "tensorrt"
    assert plan.default_model_filename == PLAN.name
    assert set(models["anatomynet_plan"].files) == {PLAN.name}
    for model in (plan, parsed(models["anatomynet"])):
        parameters = {key: value.string_value for key, value in model.parameters.items()}
        assert parameters["plan_tensorrt_version"] == "10.13.0.35"
        assert parameters["plan_compute_capability"] == "9.0"
        assert parameters["plan_gpu"] == "NVIDIA H100 80GB HBM3"
        assert parameters["largest_shape_zyx"] == f"{largest_slices(config)} 512 512"
    assert tensors(plan.input) == [("network_input", "TYPE_FP16", NETWORK_VOLUME)]
