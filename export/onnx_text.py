"""Pieces of ONNX text that export.onnx and export.slabs share: from logits to a box, and to confidence."""

from onnx import TensorProto

# What OpenVINO, ONNX Runtime and TensorRT from 10 on all read.
OPSET = 18
IR_VERSION = 10
HEADER = f'<ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}]>'

# coarse, FLOAT [classes, z, y, x] -> start and stop, INT64 [3], and boxed, the logits between them.
BOX_OF_FOREGROUND = f"""# The box of all that is not background, and one voxel around; one voxel if nothing is.
    winner = ArgMax <axis = 0, keepdims = 0> (coarse)
    foreground = Min (winner, one)
    found = Cast <to = {TensorProto.INT32}> (foreground)
    z_y = Constant <value_ints = [0, 1]> ()
    z_x = Constant <value_ints = [0, 2]> ()
    y_x = Constant <value_ints = [1, 2]> ()
    found_at_z = ReduceMax <keepdims = 0> (found, y_x)
    found_at_y = ReduceMax <keepdims = 0> (found, z_x)
    found_at_x = ReduceMax <keepdims = 0> (found, z_y)
    first_z = ArgMax (found_at_z)
    first_y = ArgMax (found_at_y)
    first_x = ArgMax (found_at_x)
    last_z = ArgMax <select_last_index = 1> (found_at_z)
    last_y = ArgMax <select_last_index = 1> (found_at_y)
    last_x = ArgMax <select_last_index = 1> (found_at_x)
    first = Concat <axis = 0> (first_z, first_y, first_x)
    last_or_end = Concat <axis = 0> (last_z, last_y, last_x)
    any_found = ReduceMax <keepdims = 0> (foreground)
    last = Mul (last_or_end, any_found)
    first_less_one = Sub (first, one)
    start = Max (first_less_one, zero)
    last_and_two = Add (last, two)
    coarse_size = Shape <start = 1> (coarse)
    stop = Min (last_and_two, coarse_size)
    boxed = Slice (coarse, start, stop, sides)"""


def border_nodes(classes: int) -> str:
    """ONNX text: boxed, FLOAT [classes, z, y, x] -> border and top_on_border, FLOAT [structures, z, y, x].

    `border` is 1 at a structure's voxels that touch another label, `top_on_border` the top probability there. Exact on
    the box of the foreground too: what touches the box from outside is background like the box's own rim.
    """
    window = "kernel_shape = [3, 3, 3], pads = [1, 1, 1, 1, 1, 1]"
    return f"""probabilities = Softmax <axis = 0> (boxed)
    top = ReduceMax <keepdims = 0> (probabilities, zero)
    label = ArgMax <axis = 0> (boxed)
    label_in_float = Cast <to = {TensorProto.FLOAT}> (label)
    image = Unsqueeze (label_in_float, zero)
    negative_image = Neg (image)
    highest = MaxPool <{window}> (image)
    negative_lowest = MaxPool <{window}> (negative_image)
    lowest = Neg (negative_lowest)
    touches_in_batch = Greater (highest, lowest)
    touches = Squeeze (touches_in_batch, zero)
    structures = Constant <value = int64[{classes - 1}, 1, 1, 1] {{{", ".join(map(str, range(1, classes)))}}}> ()
    inside = Equal (label, structures)
    on_border = And (inside, touches)
    border = Cast <to = {TensorProto.FLOAT}> (on_border)
    top_on_border = Mul (border, top)"""


def border_confidence_nodes(classes: int) -> str:
    """ONNX text: boxed, FLOAT [classes, z, y, x] -> CONFIDENCE: engine.network.border_confidence."""
    return f"""# The mean top probability over each structure's voxels that touch another label.
    {border_nodes(classes)}
    total = ReduceSum <keepdims = 0> (top_on_border, sides)
    voxels = ReduceSum <keepdims = 0> (border, sides)
    {MEAN_OF_SUMS}"""


# total and voxels, FLOAT [structures] -> CONFIDENCE.
MEAN_OF_SUMS = """at_least_one = Constant <value_floats = [1.0]> ()
    divisor = Max (voxels, at_least_one)
    CONFIDENCE = Div (total, divisor)"""
