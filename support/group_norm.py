"""Group normalisation of channels-last features on a GPU, in two passes over them.

PyTorch's own kernel takes channels first: it copies features there and back, and sums a group of
one image in a single block. At batch 1 that was 19 of the 27 ms of a VAE decode on an H100. These
kernels sum rows of positions in many blocks, then normalise; three reads and writes in all.

Shapes: B batch, C channels, G groups, D = C / G, N = H · W positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:             # it comes with PyTorch for NVIDIA GPUs, and with no other
    triton = None

ROWS, COLUMNS = 128, 64         # positions and channels that a block of these kernels reads
MOST_D = 128                    # channels of a group; 80 in SD 1.5's UNet


class ChannelsLastGroupNorm(nn.GroupNorm):
    """nn.GroupNorm, quick for features with channels last on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        fits = x.is_cuda and x.is_contiguous(memory_format=torch.channels_last)
        if not fits or torch.compiler.is_compiling():   # a compiler does better: it fuses layers
            return super().forward(x)
        too_wide = self.num_channels // self.num_groups > MOST_D
        if triton is None or too_wide or (torch.is_grad_enabled() and x.requires_grad):
            return differentiable(x, self.num_groups, self.weight, self.bias, self.eps)
        return normalise(x, self.num_groups, self.weight, self.bias, self.eps)


def install(module: nn.Module) -> None:
    """Has every group normalisation of a module be a `ChannelsLastGroupNorm`, in place."""
    for layer in module.modules():
        if type(layer) is nn.GroupNorm:
            layer.__class__ = ChannelsLastGroupNorm


def differentiable(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same from PyTorch's own operators, none of which wants channels first."""
    b, channels, height, width = x.shape
    v = x.permute(0, 2, 3, 1).reshape(b, height * width, groups, channels // groups)
    var, mean = torch.var_mean(v, dim=(1, 3), keepdim=True, correction=0)     # (B, 1, G, 1)
    scale = (var.float() + eps).rsqrt() * weight.float().view(1, 1, groups, -1)
    shift = bias.float().view(1, 1, groups, -1) - mean.float() * scale        # (B, 1, G, D)
    y = torch.addcmul(shift.to(x.dtype), v, scale.to(x.dtype))
    return y.view(b, height, width, channels).permute(0, 3, 1, 2)


def normalise(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same by the kernels below, without a gradient."""
    b, channels, height, width = x.shape
    n, d = height * width, channels // groups
    blocks = triton.cdiv(n, ROWS)
    sums = torch.empty(b, 2, blocks, channels, device=x.device, dtype=torch.float32)
    affine = torch.empty(b, 2, channels, device=x.device, dtype=torch.float32)
    y = torch.empty_like(x)
    grid = blocks, triton.cdiv(channels, COLUMNS), b
    _sum[grid](x, sums, n, channels, ROWS, COLUMNS)
    _scale_and_shift[groups, b](sums, weight, bias, affine, blocks, channels, d, n * d, eps,
                                MOST_D, 32)
    _apply[grid](x, affine, y, n, channels, ROWS, COLUMNS)
    return y


if triton is not None:
    # Block sizes are the same for all shapes, so that three kernels are compiled and not thirty.

    @triton.jit
    def _sum(x, sums, n, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Sums of values and of squares over some positions, channel by channel."""
        block, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < n) & (channel < channels)[None, :]
        v = tl.load(x + (image * n + row) * channels + channel[None, :], mask=inside, other=0)
        v = v.to(tl.float32)
        blocks = tl.num_programs(0)
        place = sums + (image * 2 * blocks + block) * channels + channel
        tl.store(place, tl.sum(v, 0), mask=channel < channels)
        tl.store(place + blocks * channels, tl.sum(v * v, 0), mask=channel < channels)

    @triton.jit
    def _scale_and_shift(sums, weight, bias, affine, blocks, channels, d, count, eps,
                         MOST_D: tl.constexpr, BLOCKS: tl.constexpr):
        """Of one group of one image: what multiplies and what is added, channel by channel."""
        group, image = tl.program_id(0), tl.program_id(1)
        offset = tl.arange(0, MOST_D)
        channel = group * d + offset
        total = tl.zeros((MOST_D,), tl.float32)
        squares = tl.zeros((MOST_D,), tl.float32)
        for start in range(0, blocks, BLOCKS):
            block = start + tl.arange(0, BLOCKS)[:, None]
            inside = (block < blocks) & (offset < d)[None, :]
            place = sums + (image * 2 * blocks + block) * channels + channel[None, :]
            total += tl.sum(tl.load(place, mask=inside, other=0), 0)
            squares += tl.sum(tl.load(place + blocks * channels, mask=inside, other=0), 0)
        mean = tl.sum(total, 0) / count
        variance = tl.maximum(tl.sum(squares, 0) / count - mean * mean, 0)
        w = tl.load(weight + channel, mask=offset < d, other=0).to(tl.float32)
        b = tl.load(bias + channel, mask=offset < d, other=0).to(tl.float32)
        scale = w / tl.sqrt(variance + eps)
        place = affine + image * 2 * channels + channel
        tl.store(place, scale, mask=offset < d)
        tl.store(place + channels, b - mean * scale, mask=offset < d)

    @triton.jit
    def _apply(x, affine, y, n, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        block, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = (row < n) & (channel < channels)
        place = (image * n + row) * channels + channel
        affine += image * 2 * channels + channel
        scale = tl.load(affine, mask=channel < channels, other=0)
        shift = tl.load(affine + channels, mask=channel < channels, other=0)
        v = tl.load(x + place, mask=inside, other=0).to(tl.float32)
        tl.store(y + place, (v * scale + shift).to(y.dtype.element_ty), mask=inside)
