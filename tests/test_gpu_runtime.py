"""engine/gpu_runtime.py and engine/gpu_network.py: on a CPU in FP32, where they must be the checkpoint itself, and on a
GPU, where one is."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.errors import GeometryError, ModelError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.gpu_network import TensorCoreNetwork
from anatomynet.engine.gpu_operations import TorchOperations
from anatomynet.engine.gpu_runtime import GpuRuntime, has_gpu
from anatomynet.engine.network import AnatomyNet
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.runtime import TorchRuntime
from anatomynet.export.parity import check_parity, draw_reference
from tests.random_network import STRIDES, random_config, random_network, smooth_hu

ROUNDING = 1e-4  # of logits of about 10, in FP32
HALF_ROUNDING = 0.05
CONFIDENCE = 1e-5
DEVICE = "cuda" if has_gpu() else "cpu"
SHAPE = (11, 35, 43)  # odd sides: padding and cropping both happen
PHANTOM_SLICES, PHANTOM_SLICES_MM = 118, 3.0
PHANTOM_SIDE, PHANTOM_SPACING = 116, 4.3  # at the network's resolution


def logits_of(network: AnatomyNet, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    form = TensorCoreNetwork(network, TorchOperations(), dtype)
    with torch.inference_mode():
        blocks = form.blocks_of(x)
        return form.logits(form.features(blocks), blocks)[:, : form.classes].float()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, ROUNDING), (torch.float16, HALF_ROUNDING)])
def test_logits_are_the_networks(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.rand(1, 1, 10, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        expected = random_network()(x)
    torch.testing.assert_close(logits_of(random_network(), x, dtype), expected, atol=tolerance, rtol=tolerance)


def test_any_number_of_classes() -> None:
    torch.manual_seed(0)
    network = AnatomyNet(17).eval()
    x = torch.rand(1, 1, 8, 10, 12) * 2 - 1
    with torch.inference_mode():
        expected = network(x)
    torch.testing.assert_close(logits_of(network, x, torch.float32), expected, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("slices", [None, 1, 3], ids=["whole", "slabs of 1", "slabs of 3"])
def test_draws_what_the_checkpoint_draws(stride: int, slices: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = random_config(stride)
    runtime = GpuRuntime(random_network(), config, device="cpu")
    if slices is not None:
        monkeypatch.setattr(runtime, "_slab_thickness", lambda features: slices)
    hu = smooth_hu(SHAPE)
    labels, confidence = runtime.infer(hu)
    expected_labels, expected_confidence = TorchRuntime(random_network(), config).infer(hu)
    assert len(np.unique(expected_labels)) > 2
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(confidence, expected_confidence, atol=CONFIDENCE)


@pytest.mark.parametrize("stride", STRIDES)
def test_nothing_there_is_all_background(stride: int) -> None:
    config = random_config(stride)
    labels, confidence = GpuRuntime(background_network(), config, device="cpu").infer(smooth_hu((9, 64, 64)))
    assert not labels.any()
    assert not confidence.any()


def background_network() -> AnatomyNet:
    torch.manual_seed(0)
    network = AnatomyNet(random_config().classes).eval()
    assert network.classify.bias is not None
    network.classify.bias.data[0] += 1000
    return network


def test_views_are_read_as_they_look_and_answers_are_ones_own() -> None:
    runtime = GpuRuntime(random_network(), random_config(), device=DEVICE)
    view = smooth_hu(SHAPE)[::-1, :, ::-1]
    labels, _ = runtime.infer(view)
    kept = labels.copy()
    contiguous = view.copy()
    contiguous.flags.writeable = False  # as Triton hands it over
    np.testing.assert_array_equal(runtime.infer(contiguous)[0], kept)
    runtime.infer(smooth_hu(SHAPE, seed=1))
    np.testing.assert_array_equal(labels, kept)
    labels[0, 0, 0] = 1


def test_several_threads_get_their_own_answers() -> None:
    runtime = GpuRuntime(random_network(), random_config(), device=DEVICE)
    volumes = [smooth_hu((8, 32, 32 + 8 * seed), seed=seed) for seed in range(3)]
    expected = [runtime.infer(hu)[0] for hu in volumes]
    with ThreadPoolExecutor(3) as pool:
        for (labels, _), own in zip(pool.map(runtime.infer, volumes), expected, strict=True):
            np.testing.assert_array_equal(labels, own)


def test_wrong_input_is_told() -> None:
    with pytest.raises(GeometryError, match=r"expected int16 of at least \(8, 32, 32\) voxels"):
        GpuRuntime(random_network(), random_config(), device=DEVICE).infer(np.zeros((8, 31, 32), np.int16))


def test_what_cannot_be_computed_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(hu: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB.")

    runtime = GpuRuntime(random_network(), random_config(), device=DEVICE)
    monkeypatch.setattr(runtime, "_computed", exhausted)
    with pytest.raises(ModelError, match=r"PyTorch .* could not compute a volume of \(8, 32, 32\)") as caught:
        runtime.infer(np.zeros((8, 32, 32), np.int16))
    assert "\n" not in str(caught.value)


class Faulty(TorchOperations):
    """Finds a fault."""

    without = "without this one"

    def fault(self, device: torch.device) -> str:
        return f"no {device}"


def test_the_first_without_a_fault_computes_and_the_others_faults_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = [Faulty(), working := TorchOperations(), Faulty()]
    monkeypatch.setattr("anatomynet.engine.gpu_runtime.operations_for", lambda device: iter(candidates))
    runtime = GpuRuntime(random_network(), random_config(), device="cpu")
    assert runtime._operations is working
    assert runtime.description.endswith("on CPU, FP32 (no cpu)")


@pytest.mark.parametrize("without", ["", "without convolutions of its own", "without kernels of its own"])
@pytest.mark.parametrize("stride", STRIDES)
def test_on_a_gpu_it_passes_the_exports_gate(stride: int, without: str) -> None:
    if not has_gpu():
        pytest.skip("needs an NVIDIA GPU and a PyTorch with CUDA")
    from anatomynet.engine.gpu_convolution import ConvolutionOperations
    from anatomynet.engine.gpu_kernels import KernelOperations

    network, config = load_checkpoint()
    config = replace(config, in_plane_stride=stride)
    # Trained weights: where random ones draw a structure it is specks, of which FP16 moves more than the gate allows.
    depth, side, spacing = PHANTOM_SLICES, PHANTOM_SIDE * stride, PHANTOM_SPACING / stride
    geometry = VolumeGeometry((depth, side, side), (spacing, spacing, PHANTOM_SLICES_MM))
    hu = make_phantom(geometry, structures=config.structures)[0].hu
    kinds = (ConvolutionOperations(torch.device("cuda")), KernelOperations(), TorchOperations())
    operations = next(kind for kind in kinds if kind.without == without)
    runtime = GpuRuntime(network, config, operations=operations)
    assert runtime.description.endswith(without or "FP16")
    check_parity(draw_reference(network, config, hu), runtime, fp16=True)


@pytest.mark.parametrize("error", ["", "CUDA error: no kernel image is available for execution on the device\nmore"])
def test_a_gpu_that_pytorch_sees_but_cannot_compute_on_is_none(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older than what that PyTorch was built for."""
    really_ones = torch.ones

    def ones(*shape: int, device: str) -> torch.Tensor:
        assert device == "cuda"
        if error:
            raise RuntimeError(error)
        return really_ones(*shape)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)
    assert has_gpu() == (not error)
