"""AnatomyNet checkpoint -> ONNX: the served model as one graph, in one file. First step of `anatomynet-export`.

    prepare   CT, INT16 [z, y, x] -> padded, averaged, normalised
    network   AnatomyNet -> logits; its BatchNorm folded into the convolutions
    finish    logits -> LABEL_MAP, UINT8 [z, y, x], and CONFIDENCE, FP32 [n]

At stride 1 the network's end and finish are computed in slabs: see export.slabs.
Each part is a graph of its own, then `served_model` puts them together. prepare and finish are written below as ONNX
text; what they must compute is engine.network.ServedNetwork, line for line. The ModelConfig goes with the file.
"""

import copy
import importlib
import logging
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.contract import METADATA_KEY
from anatomynet.engine.errors import ExportError, ModelError
from anatomynet.engine.folding import folded
from anatomynet.engine.network import AnatomyNet
from anatomynet.engine.output import write_whole
from anatomynet.engine.runtime import OnnxRuntime
from anatomynet.export.onnx_text import BOX_OF_FOREGROUND, HEADER, IR_VERSION, OPSET, border_confidence_nodes
from anatomynet.export.slabs import slab_finish_model, split_network

TRIAL_SIDES = (11, 37, 43)  # times the stride in plane, and odd: padding and cropping both happen


def write_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Checks the served model, writes it, runs it on a small volume, and only then puts it in place.

    Raises:
        ExportError: a graph that is not valid, or that does not run.
        OutputError: it cannot be written.
    """
    check_graph(model, "the exported graph")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_proven(model, path, prove=_run_once)


def check_graph(model: onnx.ModelProto, name: str) -> None:
    """Raises ExportError, which calls it `name`, for a graph that is not valid."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{name} is not valid ONNX: {error}") from error


def write_proven(model: onnx.ModelProto, path: Path, *, prove: Callable[[Path], object]) -> None:
    """Writes a graph beside `path`, has it proven there, and puts it in place unless that raises.

    Raises:
        OutputError: it cannot be written; and what `prove` raises.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # for this run alone
    try:
        write_whole(beside, model.SerializeToString(), overwrite=True)
        prove(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def served_model(network: onnx.ModelProto, config: ModelConfig, *, fp16: bool) -> onnx.ModelProto:
    """The three parts as one graph with the served contract, and the configuration in its metadata.

    Args:
        network: what `network_model` gave, in FP32.
        config: its own.
        fp16: weights and activations in FP16, but for the means over the volume and what follows the logits. It is
            for GPUs: a CPU computes such a graph in FP32.
    """
    if config.in_plane_stride == 1:
        middle, head = split_network(network)
        finish = slab_finish_model(half_model(head) if fp16 else head, config, fp16=fp16)
    else:
        middle, finish = network, finish_model(config, fp16=fp16)
    parts = (prepare_model(config, fp16=fp16), half_model(middle) if fp16 else middle, finish)
    model = _joined(parts, inputs=parts[0].graph.input, outputs=finish.graph.output)
    helper.set_model_props(model, {METADATA_KEY: config.to_json()})
    return model


def plan_model(network: onnx.ModelProto, config: ModelConfig, *, fp16: bool) -> onnx.ModelProto:
    """network_input -> LABELS, UINT8 [pz, stride x py, stride x px], and CONFIDENCE: what TensorRT can take.

    What `prepare` does comes before it, and the crop to the CT's size after it.
    """
    parts = (half_model(network) if fp16 else network, plan_finish_model(config, fp16=fp16))
    return _joined(parts, inputs=parts[0].graph.input, outputs=parts[1].graph.output)


def network_model(network: AnatomyNet) -> onnx.ModelProto:
    """AnatomyNet in FP32: network_input [1, 1, z, y, x], all sides even, to logits [1, classes, z, y, x].

    Raises:
        ExportError: PyTorch cannot export it.
    """
    model = _exported(_EvenSides(folded(network)).eval())
    for part in (*model.graph.node, *model.graph.initializer):
        del part.metadata_props[:]  # PyTorch's record of each line of code: a tenth of the file
    for value in (model.graph.input[0], model.graph.output[0]):
        for dimension, name in zip(value.type.tensor_type.shape.dim[2:], ("pz", "py", "px"), strict=True):
            dimension.dim_param = name
    return model


def _exported(network: nn.Module) -> onnx.ModelProto:
    dynamic = torch.export.Dim.DYNAMIC
    example = torch.zeros(1, 1, 8, 12, 16)
    with _quiet():
        # The exporter would import it where Ctrl-C or SIGTERM, in that second, ends in its own traceback.
        importlib.import_module("torch._dynamo")
        try:
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=({2: dynamic, 3: dynamic, 4: dynamic},),
                input_names=["network_input"],
                output_names=["logits"],
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            raise ExportError(f"PyTorch could not export the network: {first_line}") from error
    if program is None:  # so typed; it is None only without `dynamo`
        raise ExportError("PyTorch exported nothing: expected an ONNX program")
    model: onnx.ModelProto = program.model_proto
    return model


def half_model(network: onnx.ModelProto) -> onnx.ModelProto:
    """The network in FP16: weights, activations, input and logits.

    Squeeze-and-excitation's means stay in FP32: their sums run over millions of voxels, which FP16 cannot count.
    This is done here, on the graph: PyTorch's exporter drops the casts around such a mean.
    """
    model = copy.deepcopy(network)
    graph = model.graph
    del graph.value_info[:]
    for weight in graph.initializer:
        if weight.data_type == TensorProto.FLOAT:
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    nodes = [island for node in graph.node for island in (_mean_in_float(node) if _is_mean(node) else [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def prepare_model(config: ModelConfig, *, fp16: bool) -> onnx.ModelProto:
    """CT, INT16 [z, y, x] -> network_input [1, 1, pz, py, px]: ServedNetwork.network_input_from_hu."""
    stride = config.in_plane_stride
    low, high = config.hu_window
    kind, code = ("float16", TensorProto.FLOAT16) if fp16 else ("float", TensorProto.FLOAT)
    return onnx.parser.parse_model(f"""{HEADER}
prepare (int16[z, y, x] CT) => ({kind}[1, 1, pz, py, px] network_input) {{
    # Padded at the far end with air: to even sides in z, to 2 x stride in plane.
    size = Shape (CT)
    step = Constant <value_ints = [2, {2 * stride}, {2 * stride}]> ()
    step_less_one = Constant <value_ints = [1, {2 * stride - 1}, {2 * stride - 1}]> ()
    reach = Add (size, step_less_one)
    steps = Div (reach, step)
    padded_size = Mul (steps, step)
    pad_after = Sub (padded_size, size)
    pad_before = Constant <value_ints = [0, 0, 0]> ()
    pads = Concat <axis = 0> (pad_before, pad_after)
    low = Constant <value_float = {float(low)}> ()
    hu = Cast <to = {TensorProto.FLOAT}> (CT)
    padded = Pad (hu, pads, low)
    # Averaged in plane.
    batch_and_channel = Constant <value_ints = [0, 1]> ()
    volume = Unsqueeze (padded, batch_and_channel)
    averaged = AveragePool <kernel_shape = [1, {stride}, {stride}], strides = [1, {stride}, {stride}]> (volume)
    # The window to -1..1, clipped.
    high = Constant <value_float = {float(high)}> ()
    centre = Constant <value_float = {(low + high) / 2}> ()
    half_width = Constant <value_float = {(high - low) / 2}> ()
    clipped = Clip (averaged, low, high)
    centred = Sub (clipped, centre)
    normalised = Div (centred, half_width)
    network_input = Cast <to = {code}> (normalised)
}}""")


def finish_model(config: ModelConfig, *, fp16: bool) -> onnx.ModelProto:
    """Logits [1, classes, pz, py, px] and CT -> LABEL_MAP and CONFIDENCE, all in FP32.

    ServedNetwork interpolates the logits of the whole volume. Here only a box is: between two neighbours on which the
    background wins, it wins too, so what lies further than one voxel from the foreground is background. The same
    labels, 40 times cheaper.
    """
    stride = config.in_plane_stride
    kind = "float16" if fp16 else "float"
    return onnx.parser.parse_model(f"""{HEADER}
finish ({kind}[1, {config.classes}, pz, py, px] logits, int16[z, y, x] CT)
    => (uint8[z, y, x] LABEL_MAP, float[{len(config.structures)}] CONFIDENCE) {{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    sides = Constant <value_ints = [1, 2, 3]> ()
    logits_in_float = Cast <to = {TensorProto.FLOAT}> (logits)
    coarse = Squeeze (logits_in_float, zero)
    {BOX_OF_FOREGROUND}
    {border_confidence_nodes(config.classes)}
    {interpolation_nodes(stride)}
    fine_winner = ArgMax <axis = 0, keepdims = 0> (fine)
    labels = Cast <to = {TensorProto.UINT8}> (fine_winner)
    # Laid into the CT's own grid, which may end before the padded one.
    scale = Constant <value_ints = [1, {stride}, {stride}]> ()
    axes = Constant <value_ints = [0, 1, 2]> ()
    origin = Constant <value_ints = [0, 0, 0]> ()
    size = Shape (CT)
    before = Mul (start, scale)
    room = Sub (size, before)
    kept = Slice (labels, origin, room, axes)
    kept_size = Shape (kept)
    after = Sub (room, kept_size)
    pads = Concat <axis = 0> (before, after)
    LABEL_MAP = Pad (kept, pads)
}}""")


def plan_finish_model(config: ModelConfig, *, fp16: bool) -> onnx.ModelProto:
    """`finish_model` for TensorRT, which cannot cut a box that hangs on values: on the whole grid, and not cropped."""
    kind = "float16" if fp16 else "float"
    return onnx.parser.parse_model(f"""{HEADER}
finish ({kind}[1, {config.classes}, pz, py, px] logits)
    => (uint8[pz, fy, fx] LABELS, float[{len(config.structures)}] CONFIDENCE) {{
    zero = Constant <value_ints = [0]> ()
    sides = Constant <value_ints = [1, 2, 3]> ()
    logits_in_float = Cast <to = {TensorProto.FLOAT}> (logits)
    boxed = Squeeze (logits_in_float, zero)
    {border_confidence_nodes(config.classes)}
    {interpolation_nodes(config.in_plane_stride)}
    fine_winner = ArgMax <axis = 0, keepdims = 0> (fine)
    # TensorRT converts to UINT8 from floats only.
    winner_in_float = Cast <to = {TensorProto.FLOAT}> (fine_winner)
    LABELS = Cast <to = {TensorProto.UINT8}> (winner_in_float)
}}""")


def crop_model() -> onnx.ModelProto:
    """LABELS, UINT8 on the padded grid, and CT -> LABEL_MAP, of the CT's own size: what comes after a plan."""
    return onnx.parser.parse_model(f"""{HEADER}
crop (uint8[pz, fy, fx] LABELS, int16[z, y, x] CT) => (uint8[z, y, x] LABEL_MAP) {{
    origin = Constant <value_ints = [0, 0, 0]> ()
    axes = Constant <value_ints = [0, 1, 2]> ()
    size = Shape (CT)
    LABEL_MAP = Slice (LABELS, origin, size, axes)
}}""")


def interpolation_nodes(stride: int) -> str:
    """ONNX text: boxed, FLOAT [classes, z, y, x] -> fine, [classes, z, stride x y, stride x x], linear in plane."""
    if stride == 1:
        return "fine = Identity (boxed)"
    return f"""scales = Constant <value_floats = [1.0, 1.0, {stride}.0, {stride}.0]> ()
    fine = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel"> (boxed, , scales)"""


def _joined(
    parts: Sequence[onnx.ModelProto],
    *,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """One model of several in a row: a part's output feeds the input of that name in a later one."""
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    for part in parts:
        graph = onnx.compose.add_prefix_graph(
            part.graph, f"{part.graph.name}/", rename_inputs=False, rename_outputs=False
        )
        nodes.extend(graph.node)
        weights.extend(graph.initializer)
    graph = helper.make_graph(nodes, "anatomynet", inputs, outputs, weights)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="anatomynet"
    )


def _is_mean(node: onnx.NodeProto) -> bool:
    return bool(node.op_type == "ReduceMean")


def _mean_in_float(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    source, axes = node.input
    (target,) = node.output
    mean = copy.deepcopy(node)
    mean.input[:] = [f"{target}/float_input", axes]
    mean.output[:] = [f"{target}/float"]
    return [
        helper.make_node("Cast", [source], [mean.input[0]], to=TensorProto.FLOAT),
        mean,
        helper.make_node("Cast", [mean.output[0]], [target], to=TensorProto.FLOAT16),
    ]


class _EvenSides(nn.Module):
    """AnatomyNet without its padding, as a module of its own: what PyTorch exports."""

    def __init__(self, network: AnatomyNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.logits_of_even_sides(x)


def _run_once(path: Path) -> None:
    """Runs the file as a user would, on a small volume of odd sides."""
    try:
        runtime = OnnxRuntime(path)
        stride = runtime.model.in_plane_stride
        depth, height, width = TRIAL_SIDES
        shape = (depth, height * stride - (stride > 1), width * stride - (stride > 1))
        hu = np.random.default_rng(0).integers(-1000, 1000, shape, dtype=np.int16)
        label_map, confidence = runtime.infer(hu)
    except ModelError as error:
        raise ExportError(f"the exported graph does not run: {error}") from error
    structures = len(runtime.model.structures)
    if label_map.shape != hu.shape or label_map.max() > structures or confidence.shape != (structures,):
        raise ExportError(
            f"the exported graph gave labels to {label_map.max()} of shape {label_map.shape} and {confidence.shape} "
            f"confidences: expected labels to {structures} of shape {hu.shape}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporter warns of its own parts, and of an optional package that AnatomyNet has no use for."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`isinstance\\(treespec, LeafSpec\\)`", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
