"""The network's end in slabs of slices: what lets a CT at native resolution fit in memory. For stride 1 alone.

After the last squeeze-and-excitation block nothing looks further than four voxels: a transposed convolution, three
convolutions of 3 x 3 x 3 in a row, the labels of neighbours. There the network is at the CT's own resolution, and its
tensors are largest: 2.6 GB each for 178 x 512 x 512. An ONNX Loop computes them for a few slices at a time, with a halo
in which all that is near enough to matter lies: every label is that of the whole.

What comes before, at half the resolution, stays whole: its means run over the whole volume, so that in slabs each of
its twelve blocks would be computed twice, or be kept, which is what the memory goes to.
"""

import onnx
from onnx import TensorProto, helper

from anatomynet.engine.config import ModelConfig
from anatomynet.engine.network import STEM_CHANNELS
from anatomynet.export.onnx_text import BOX_OF_FOREGROUND, HEADER, MEAN_OF_SUMS, border_nodes

# In slices of the features, each of which is two of the CT. A thicker slab computes less twice, and takes more memory.
SLAB = 8
HALO = 2


def split_network(network: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """What `network_model` of export.onnx gave, cut behind its last squeeze-and-excitation block.

    Returns:
        network_input -> features, [1, 28, pz / 2, py / 2, px / 2]; and features, network_input -> logits.
    """
    (upsample,) = (node for node in network.graph.node if node.op_type == "ConvTranspose")
    name = upsample.input[0]
    extractor = onnx.utils.Extractor(network)
    trunk = extractor.extract_model(["network_input"], [name])
    head = extractor.extract_model([name, "network_input"], ["logits"])
    for part, title in ((trunk, "trunk"), (head, "head")):
        part.graph.name = title
        del part.graph.value_info[:]
        _rename(part.graph, {name: "features"})
    return trunk, head


def slab_finish_model(head: onnx.ModelProto, config: ModelConfig, *, fp16: bool) -> onnx.ModelProto:
    """Features, network_input and CT -> LABEL_MAP and CONFIDENCE: the head and ServedNetwork's end, slab by slab.

    Args:
        head: of `split_network`, in the precision that `fp16` says.
    """
    kind = "float16" if fp16 else "float"
    structures = len(config.structures)
    model = onnx.parser.parse_model(f"""{HEADER}
slabs ({kind}[1, {STEM_CHANNELS}, fz, fy, fx] features, {kind}[1, 1, pz, py, px] network_input, int16[z, y, x] CT)
    => (uint8[z, y, x] LABEL_MAP, float[{structures}] CONFIDENCE) {{
    depth = Shape <start = 2, end = 3> (features)
    thickness = Constant <value_ints = [{SLAB}]> ()
    thickness_less_one = Constant <value_ints = [{SLAB - 1}]> ()
    reach = Add (depth, thickness_less_one)
    counts = Div (reach, thickness)
    count = Squeeze (counts)
    # Every window is as thick as the others, so that a runtime sees one shape: the outermost reach further inwards.
    thickest = Constant <value_ints = [{SLAB + 2 * HALO}]> ()
    window = Min (depth, thickest)
    last_window = Sub (depth, window)
    true = Constant <value = bool {{1}}> ()
    labels, totals, border_voxels = Loop (count, true)
    # The slabs one after the other, cut to the CT's own size.
    any_depth = Constant <value_ints = [-1]> ()
    plane = Shape <start = 3> (network_input)
    stacked_shape = Concat <axis = 0> (any_depth, plane)
    stacked = Reshape (labels, stacked_shape)
    origin = Constant <value_ints = [0, 0, 0]> ()
    axes = Constant <value_ints = [0, 1, 2]> ()
    size = Shape (CT)
    LABEL_MAP = Slice (stacked, origin, size, axes)
    slabs = Constant <value_ints = [0]> ()
    total = ReduceSum <keepdims = 0> (totals, slabs)
    voxels = ReduceSum <keepdims = 0> (border_voxels, slabs)
    {MEAN_OF_SUMS}
}}""")
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    loop.attribute.append(helper.make_attribute("body", _slab_graph(head, config.classes)))
    return model


def _slab_graph(head: onnx.ModelProto, classes: int) -> onnx.GraphProto:
    """The Loop's body. Constants and weights are its own: a runtime prepares no weights that come from outside."""
    body = onnx.parser.parse_graph(f"""slab (int64 number, bool go)
    => (bool go_on, uint8[{2 * SLAB}, py, px] slab_labels, float[{classes - 1}] total, float[{classes - 1}] voxels) {{
    go_on = Identity (go)
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    sides = Constant <value_ints = [1, 2, 3]> ()
    slab = Constant <value_ints = [{SLAB}]> ()
    fine_slab = Constant <value_ints = [{2 * SLAB}]> ()
    halo = Constant <value_ints = [{HALO}]> ()
    # The window around this slab, of the features and of the twice as fine input.
    numbers = Unsqueeze (number, zero)
    slab_start = Mul (numbers, slab)
    before_slab = Sub (slab_start, halo)
    before_slab_or_first = Max (before_slab, zero)
    window_start = Min (before_slab_or_first, last_window)
    window_stop = Add (window_start, window)
    slab_features = Slice (features, window_start, window_stop, two)
    fine_start = Mul (window_start, two)
    fine_stop = Mul (window_stop, two)
    slab_input = Slice (network_input, fine_start, fine_stop, two)
    logits_in_float = Cast <to = {TensorProto.FLOAT}> (slab_logits)
    coarse = Squeeze (logits_in_float, zero)
    {BOX_OF_FOREGROUND}
    {border_nodes(classes)}
    # What is the slab's own, in the window and in the box.
    slab_in_window = Sub (slab_start, window_start)
    own_start = Mul (slab_in_window, two)
    own_stop = Add (own_start, fine_slab)
    box_start = Gather (start, zero)
    start_in_box = Sub (own_start, box_start)
    stop_in_box = Sub (own_stop, box_start)
    own_start_in_box = Max (start_in_box, zero)
    own_stop_in_box = Max (stop_in_box, zero)
    own_top = Slice (top_on_border, own_start_in_box, own_stop_in_box, one)
    own_border = Slice (border, own_start_in_box, own_stop_in_box, one)
    total = ReduceSum <keepdims = 0> (own_top, sides)
    voxels = ReduceSum <keepdims = 0> (own_border, sides)
    # The last slab may be thinner: all are as thick in what the Loop stacks.
    own_winner = Slice (winner, own_start, own_stop, zero)
    own_labels = Cast <to = {TensorProto.UINT8}> (own_winner)
    own_depth = Shape <start = 0, end = 1> (own_labels)
    missing = Sub (fine_slab, own_depth)
    pads_before = Constant <value_ints = [0, 0, 0]> ()
    pads_in_plane = Constant <value_ints = [0, 0]> ()
    pads = Concat <axis = 0> (pads_before, missing, pads_in_plane)
    slab_labels = Pad (own_labels, pads)
}}""")
    graph = onnx.compose.add_prefix_graph(head.graph, "head/", rename_inputs=False, rename_outputs=False)
    _rename(graph, {"features": "slab_features", "network_input": "slab_input", "logits": "slab_logits"})
    nodes = list(body.node)
    first_after = next(index for index, node in enumerate(nodes) if "slab_logits" in node.input)
    del body.node[:]
    body.node.extend((*nodes[:first_after], *graph.node, *nodes[first_after:]))
    body.initializer.extend(graph.initializer)
    return body


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
