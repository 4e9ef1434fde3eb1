"""Operations as kernels of their own, each one pass over memory; in Triton's language, which compiles at first use.

This Triton is OpenAI's compiler, which comes with PyTorch for CUDA; the server of the same name is another thing.
TRITON_INTERPRET=1 runs the kernels without a GPU: slowly, for tests.
"""

import subprocess

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from anatomynet.engine.gpu_operations import TorchConvolutions, first_line

# What the first use of a kernel raises where it cannot be compiled: no C compiler, or nowhere to keep what it made. It
# cannot be loaded from where nothing may be run (ImportError), nor where libcuda is not found (AssertionError).
FAILURES = (TritonError, RuntimeError, OSError, subprocess.SubprocessError, ImportError, AssertionError)
SLOPE = 0.01  # of LeakyReLU, as in engine.network
BLOCK = 2048  # elements, or voxels times columns
PROGRAMS = 1056  # of a reduction: eight for each multiprocessor of the largest GPUs


@triton.jit  # `count` is nearly always a multiple of 16: known to be, it lets a thread load eight values at once
def _combine(
    rows,
    others,
    scale,
    shift,
    out,
    count,
    ROWS_STRIDE: tl.constexpr,
    OTHERS_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_OTHERS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    local = tl.arange(0, BLOCK)
    index = start + local
    inside = index < count
    shifted = local if BLOCK % CHANNELS == 0 else local + (start % CHANNELS).to(tl.int32)
    row, channel = start // CHANNELS + shifted // CHANNELS, shifted % CHANNELS
    # Where nothing lies between rows, an index that the compiler sees to be one piece.
    place = index if ROWS_STRIDE == CHANNELS else row * ROWS_STRIDE + channel
    value = tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        value *= tl.load(scale + channel)
    if HAS_OTHERS:
        place = index if OTHERS_STRIDE == CHANNELS else row * OTHERS_STRIDE + channel
        value += tl.load(others + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        value += tl.load(shift + channel)
    value = tl.where(value > 0, value, value * SLOPE)
    tl.store(out + index, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _channel_sums(rows, sums, count, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, WIDTH)
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, count, tl.num_programs(0) * BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = (row < count)[:, None] & (channel < CHANNELS)[None, :]
        place = row[:, None] * CHANNELS + channel[None, :]
        total += tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0) * WIDTH + channel, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["count"])
def _winners(
    rows, labels, top, count, STRIDE: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    inside = row < count
    place = row[:, None] * STRIDE + column[None, :]
    # All columns, sixteen bytes at once, then those that count.
    logits = tl.load(rows + place, mask=inside[:, None] & (column < STRIDE)[None, :], other=0.0).to(tl.float32)
    logits = tl.where((column < CLASSES)[None, :], logits, -float("inf"))
    highest = tl.max(logits, axis=1)
    total = tl.sum(tl.exp(logits - highest[:, None]), axis=1)
    label = tl.min(tl.where(logits == highest[:, None], column[None, :], WIDTH), axis=1)
    tl.store(labels + row, label.to(tl.uint8), mask=inside)
    tl.store(top + row, 1.0 / total, mask=inside)


@triton.jit(do_not_specialize=["depth", "height", "width"])
def _border_sums(
    labels, top, sums, voxels, depth, height, width, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    # A program has one slice, ROWS rows of it, and all columns in pieces of BLOCK.
    z, first_y = tl.program_id(0), tl.program_id(1) * ROWS
    label_of = tl.arange(0, WIDTH)
    total, count = tl.zeros((BLOCK, WIDTH), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    for y in range(first_y, tl.minimum(first_y + ROWS, height)):
        for first_x in range(0, width, BLOCK):
            x = first_x + tl.arange(0, BLOCK)
            here = (z.to(tl.int64) * height + y) * width + x
            inside = x < width
            own = tl.load(labels + here, mask=inside, other=0)
            differs = tl.zeros((BLOCK,), tl.int1)
            for dz in tl.static_range(-1, 2):
                for dy in tl.static_range(-1, 2):
                    for dx in tl.static_range(-1, 2):
                        there = (z + dz >= 0) & (z + dz < depth) & (y + dy >= 0) & (y + dy < height)
                        known = inside & there & (x + dx >= 0) & (x + dx < width)
                        place = here + (dz * height + dy) * width + dx
                        other = tl.load(labels + place, mask=known, other=0)
                        differs |= known & (other != own)
            weight = tl.where(differs, tl.load(top + here, mask=inside, other=0.0), 0.0)
            is_label = own.to(tl.int32)[:, None] == label_of[None, :]
            total += tl.where(is_label, weight[:, None], 0.0)
            count += tl.where(is_label & differs[:, None], 1.0, 0.0)
    place = (z * tl.num_programs(1) + tl.program_id(1)) * WIDTH + label_of
    tl.store(sums + place, tl.sum(total, axis=0))
    tl.store(voxels + place, tl.sum(count, axis=0))


class KernelOperations(TorchConvolutions):
    """See engine.gpu_operations."""

    without = "without convolutions of its own"

    def fault(self, device: torch.device) -> str:
        """See Operations."""
        rows = torch.zeros(512, 16, dtype=torch.float16, device=device)
        channels = torch.zeros(16, device=device)
        try:
            self.scale_add_leaky(rows, channels, rows.clone(), channels)
            self.channel_means(rows)
            labels, top = self.winners(rows, 2)
            self.border_confidence(labels.view(8, 8, 8), top.view(8, 8, 8), 2)
        except FAILURES as error:
            return first_line(error)
        return ""

    def shift_leaky(self, rows: Tensor, shift: Tensor) -> Tensor:
        """See Operations."""
        return _combined(rows, rows, shift=shift)

    def leaky(self, rows: Tensor) -> Tensor:
        """See TorchConvolutions."""
        return _combined(rows, torch.empty(rows.shape, dtype=rows.dtype, device=rows.device))

    def add_leaky(self, rows: Tensor, others: Tensor) -> Tensor:
        """See TorchConvolutions."""
        return _combined(rows, rows, others=others)

    def scale_add_leaky(self, rows: Tensor, scale: Tensor, others: Tensor, shift: Tensor) -> Tensor:
        """See Operations."""
        return _combined(rows, rows, scale=scale, others=others, shift=shift)

    def channel_means(self, rows: Tensor) -> Tensor:
        """See TorchConvolutions."""
        count, channels = rows.shape
        width = triton.next_power_of_2(channels)
        sums = rows.new_empty(PROGRAMS, width, dtype=torch.float32)
        _channel_sums[(PROGRAMS,)](rows, sums, count, channels, width, max(BLOCK // width, 1))
        return sums.sum(dim=0)[:channels] / count

    def winners(self, rows: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """See Operations."""
        count = rows.shape[0]
        labels = rows.new_empty(count, dtype=torch.uint8)
        top = rows.new_empty(count, dtype=torch.float32)
        width = triton.next_power_of_2(rows.stride(0))
        block = max(BLOCK // width, 1)
        _winners[(triton.cdiv(count, block),)](rows, labels, top, count, rows.stride(0), classes, width, block)
        return labels, top

    def border_confidence(self, labels: Tensor, top: Tensor, classes: int) -> Tensor:
        """See Operations."""
        depth, height, columns = labels.shape
        rows, width = 16, triton.next_power_of_2(classes)
        grid = (depth, triton.cdiv(height, rows))
        sums, voxels = top.new_empty(2, grid[0] * grid[1], width)
        _border_sums[grid](labels, top, sums, voxels, depth, height, columns, rows, width, 256)
        means: Tensor = (sums.sum(dim=0) / voxels.sum(dim=0).clamp(min=1))[1:classes]
        return means


def _combined(
    rows: Tensor,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    others: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    count, channels = rows.numel(), rows.shape[1]
    assert rows.stride(1) == 1
    assert others is None or others.stride(1) == 1
    _combine[(triton.cdiv(count, BLOCK),)](
        rows,
        rows if others is None else others,
        rows if scale is None else scale,
        rows if shift is None else shift,
        out,
        count,
        rows.stride(0),
        rows.stride(0) if others is None else others.stride(0),
        channels,
        others is not None,
        scale is not None,
        shift is not None,
        SLOPE,
        BLOCK,
    )
    return out
