"""The region finder's checkpoint -> ONNX: the served model `anatomynet_region` as one graph, in one file.

    CT_COARSE, INT16 [z, y, x] -> padded, normalised -> the U-Net -> BOX, INT64 [6]: start z, y, x and stop z, y, x

It is written below as ONNX text; what it must compute is engine.region_network.ServedRegion, line for line.
`python -m anatomynet.export.region` makes engine/weights/region.onnx.
"""

from pathlib import Path

import click
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from anatomynet.engine.checkpoint import load_region_checkpoint
from anatomynet.engine.command import reports_errors
from anatomynet.engine.contract import REGION_METADATA_KEY
from anatomynet.engine.errors import ParityError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.region import RegionConfig
from anatomynet.engine.region_network import POOLED, SLOPE, RegionNetwork, ServedRegion
from anatomynet.engine.region_runtime import EmbeddedRegionFinder, shipped_region
from anatomynet.export.onnx import check_graph, write_proven
from anatomynet.export.onnx_text import HEADER

TRIALS = 4  # parts of a phantom that each form must find the same box in
PHANTOM_SEED = 0
PHANTOM_SHAPE = (59, 63, 63)  # coarse voxels (z, y, x): a planning CT


def export_region(network: RegionNetwork, config: RegionConfig, path: Path) -> None:
    """Writes the served region finder, once it has found what PyTorch finds on a phantom and on parts of it.

    Raises:
        ExportError: a graph that is not valid.
        ParityError: it finds another box.
        OutputError: it cannot be written.
    """
    model = region_model(network, config)
    check_graph(model, "the exported region finder")
    write_proven(model, path, prove=lambda file: check_region_parity(network, EmbeddedRegionFinder(file)))


def check_region_parity(network: RegionNetwork, finder: EmbeddedRegionFinder) -> None:
    """Holds a finder against PyTorch on a phantom, and on less and less of it.

    Raises:
        ParityError: another box.
    """
    volume, _ = make_phantom(VolumeGeometry(PHANTOM_SHAPE, finder.config.coarse_spacing), seed=PHANTOM_SEED)
    served = ServedRegion(network, finder.config)
    for trial in range(TRIALS):
        part = np.ascontiguousarray(volume.hu[7 * trial :, trial : -1 - trial, 5 * trial :])
        with torch.inference_mode():
            expected = served(torch.from_numpy(part)).tolist()
        found = finder.find(part).tolist()
        if found != expected:
            raise ParityError(f"the exported region finder finds {found} where its checkpoint finds {expected}")


def region_model(network: RegionNetwork, config: RegionConfig) -> onnx.ModelProto:
    """The served graph, in FP32, its configuration in the metadata."""
    model = onnx.parser.parse_model(f"""{HEADER}
region (int16[z, y, x] CT_COARSE) => (int64[6] BOX) {{
    {_prepared(config)}
    {_u_net()}
    {_box(config)}
}}""")
    for name, weight in network.state_dict().items():
        model.graph.initializer.append(
            numpy_helper.from_array(weight.detach().cpu().contiguous().numpy(), name.replace(".", "_"))
        )
    helper.set_model_props(model, {REGION_METADATA_KEY: config.to_json()})
    model.producer_name = "anatomynet"
    return model


def _prepared(config: RegionConfig) -> str:
    """ONNX text: CT_COARSE -> network_input."""
    low, high = config.hu_window
    return f"""# Air is 0. Padded with it at the far end, to multiples of {POOLED}.
    size = Shape (CT_COARSE)
    step = Constant <value_ints = [{POOLED}]> ()
    step_less_one = Constant <value_ints = [{POOLED - 1}]> ()
    reach = Add (size, step_less_one)
    steps = Div (reach, step)
    padded_size = Mul (steps, step)
    pad_after = Sub (padded_size, size)
    origin = Constant <value_ints = [0, 0, 0]> ()
    pads = Concat <axis = 0> (origin, pad_after)
    low = Constant <value_float = {float(low)}> ()
    high = Constant <value_float = {float(high)}> ()
    width = Constant <value_float = {float(high - low)}> ()
    hu = Cast <to = {TensorProto.FLOAT}> (CT_COARSE)
    clipped = Clip (hu, low, high)
    above_air = Sub (clipped, low)
    normalised = Div (above_air, width)
    padded = Pad (normalised, pads)
    batch_and_channel = Constant <value_ints = [0, 1]> ()
    network_input = Unsqueeze (padded, batch_and_channel)"""


def _u_net() -> str:
    """ONNX text: network_input -> logits."""
    return f"""{_two_convolutions("encode_fine", "network_input", "fine")}
    fine_pooled = MaxPool <kernel_shape = [2, 2, 2], strides = [2, 2, 2]> (fine)
    {_two_convolutions("encode_middle", "fine_pooled", "middle")}
    middle_pooled = MaxPool <kernel_shape = [2, 2, 2], strides = [2, 2, 2]> (middle)
    {_two_convolutions("encode_coarse", "middle_pooled", "coarse")}
    doubling = Constant <value_floats = [1.0, 1.0, 2.0, 2.0, 2.0]> ()
    {_joined("coarse", "middle")}
    {_two_convolutions("decode_middle", "coarse_and_middle", "middle_again")}
    {_joined("middle_again", "fine")}
    {_two_convolutions("decode_fine", "middle_again_and_fine", "fine_again")}
    logits = Conv (fine_again, classify_weight, classify_bias)"""


def _box(config: RegionConfig) -> str:
    """ONNX text: logits -> BOX; `size`, `origin` and `batch_and_channel` are of `_prepared`."""
    return f"""# The box of what counts, and a margin; six zeros where nothing does.
    grid = Squeeze (logits, batch_and_channel)
    axes = Constant <value_ints = [0, 1, 2]> ()
    kept = Slice (grid, origin, size, axes)
    threshold = Constant <value_float = {float(config.threshold)}> ()
    counts = Greater (kept, threshold)
    found = Cast <to = {TensorProto.INT32}> (counts)
    {_first_and_last("z", "[1, 2]")}
    {_first_and_last("y", "[0, 2]")}
    {_first_and_last("x", "[0, 1]")}
    first = Concat <axis = 0> (first_z, first_y, first_x)
    last = Concat <axis = 0> (last_z, last_y, last_x)
    margin = Constant <value_ints = [{", ".join(map(str, config.margin))}]> ()
    margin_and_one = Constant <value_ints = [{", ".join(str(m + 1) for m in config.margin)}]> ()
    before = Sub (first, margin)
    start = Max (before, origin)
    after = Add (last, margin_and_one)
    stop = Min (after, size)
    box = Concat <axis = 0> (start, stop)
    any = ReduceMax <keepdims = 0> (found)
    any_found = Cast <to = {TensorProto.INT64}> (any)
    BOX = Mul (box, any_found)"""


def _two_convolutions(name: str, source: str, target: str) -> str:
    """ONNX text: engine.region_network's block of that name."""
    conv = "Conv <pads = [1, 1, 1, 1, 1, 1]>"
    leaky = f"LeakyRelu <alpha = {SLOPE}>"
    return f"""{target}_1 = {conv} ({source}, {name}_0_weight, {name}_0_bias)
    {target}_2 = {leaky} ({target}_1)
    {target}_3 = {conv} ({target}_2, {name}_2_weight, {name}_2_bias)
    {target} = {leaky} ({target}_3)"""


def _joined(deep: str, skip: str) -> str:
    nearest = 'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"'
    return f"""{deep}_doubled = Resize <{nearest}> ({deep}, , doubling)
    {deep}_and_{skip} = Concat <axis = 1> ({deep}_doubled, {skip})"""


def _first_and_last(axis: str, others: str) -> str:
    """ONNX text: found, INT32 [z, y, x] -> the first and the last plane of an axis that holds anything, INT64 [1]."""
    return f"""others_{axis} = Constant <value_ints = {others}> ()
    found_{axis} = ReduceMax <keepdims = 0> (found, others_{axis})
    first_{axis} = ArgMax <axis = 0> (found_{axis})
    last_{axis} = ArgMax <axis = 0, select_last_index = 1> (found_{axis})"""


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@reports_errors
def main(checkpoint: Path | None) -> None:
    """Export a region finder's CHECKPOINT, by default the shipped one, to an ONNX file beside it."""
    output = (checkpoint or shipped_region(".safetensors")).with_suffix(".onnx")
    export_region(*load_region_checkpoint(checkpoint), output)
    click.echo(output)


if __name__ == "__main__":
    main()
