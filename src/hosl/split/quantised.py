"""A client half whose frozen weights are bfloat16, or int8 in the linear layers of its blocks. Adapters come after.

int8 is weight-only, symmetric, one float32 scale per output row: W ~ s q, q in -127..127. Forward and backward never
hold more than one tile of a layer's weights in the compute dtype. Why not torchao: docs/adr/0006-low-precision-base.md.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hosl.errors import ConfigError, ModelError
from hosl.split.adapters import lora_layers
from hosl.split.halves import ClientHalf

BaseDtype = Literal["bfloat16", "int8"]

_TILE_ELEMENTS = 1 << 18
"""The weights in the compute dtype at once: 1 MiB in float32. Smaller tiles are slower, larger ones hardly faster."""
_ALIGNED = 64
"""Tiles are multiples of this many rows or columns: 341 rows took a fifth longer than 256 (AVX-512, one thread)."""


def quantise_(half: ClientHalf, dtype: BaseDtype) -> None:
    """Make a half's weights low-precision, in place, tensor by tensor. The hidden state keeps its dtype.

    bfloat16: every weight; the half computes in bfloat16. int8: the linear layers of the blocks (GPT-2's transposed
    ones too); embeddings, norms and biases stay, and so does the compute dtype.

    Raises:
        ConfigError: if the half has adapters: they are put on afterwards, and stay float32.
        ModelError: if a weight is NaN or infinite.
    """
    if lora_layers(half):
        raise ConfigError(f"a half with adapters cannot be made {dtype}; quantise it before add_lora")
    half.hidden_dtype = next(half.parameters()).dtype
    if dtype == "bfloat16":
        half.convert(torch.bfloat16)
        return
    blocks: nn.Module = half.model.get_submodule(half.blocks_name)
    for name, module in list(blocks.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, Int8Linear):
            rows = module.weight if isinstance(module, nn.Linear) else module.weight.T
            blocks.set_submodule(name, Int8Linear(rows, module.bias, f"{half.blocks_name}.{name}"))
    for tensor in (*half.parameters(), *half.model.buffers()):
        # a tensor read from a file is a view of the mapped file: one view keeps the whole file in float32 in memory
        if tensor.dtype != torch.int8:
            tensor.data = tensor.data.clone()


def quantise_rows(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, s) with |W - s q| <= s/2 and s = max |W| / 127 of each row; q int8 [out, in], s float32 [out].

    Raises:
        ModelError: if a row of `name` has no finite scale.
    """
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    if weight.is_meta:  # the planner's: it has no values
        return q, scale
    smallest = torch.finfo(torch.float32).tiny  # the scale of a row of zeros
    for start, stop in _tiles(len(weight), across=weight.shape[1]):
        tile = weight[start:stop].to(torch.float32)
        s = tile.abs().amax(1).div_(127).clamp_min_(smallest)
        scale[start:stop] = s
        q[start:stop] = tile.div(s[:, None]).round_()
    if not scale.isfinite().all():
        raise ModelError(f"{name}.weight holds NaN or infinite values, int8 has no scale for them")
    return q, scale


class Int8Linear(nn.Linear):
    """y = x (s q)^T + b, the weights int8 and frozen; differentiable in x. A Linear, so that peft adapts it."""

    scale: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, name: str) -> None:
        """Quantise a weight [out, in], which may be a transposed view; the bias is taken over. `name` is for errors."""
        nn.Module.__init__(self)  # not Linear's, which would allocate float weights
        self.out_features, self.in_features = weight.shape
        q, scale = quantise_rows(weight.detach(), name)
        self.weight = nn.Parameter(q, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], in the dtype of `input`."""
        return _Product.apply(input, self.weight, self.scale, self.bias)  # pyright: ignore[reportReturnType]


class _Product(torch.autograd.Function):
    """x (s q)^T + b. Keeps q and s for backward: autograd's own would keep the dequantised weights."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(q, scale)
        rows = x.reshape(-1, x.shape[-1])
        out = x.new_empty(len(rows), len(q))
        for start, stop in _tiles(len(q), across=q.shape[1]):
            tile = out[:, start:stop]
            # -127..127 is exact in bfloat16, s q is not: the scale goes to the product
            torch.mm(rows, q[start:stop].to(x.dtype).T, out=tile)
            tile.mul_(scale[start:stop])
            if bias is not None:
                tile.add_(bias[start:stop])
        return out.view(*x.shape[:-1], len(q))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        q, scale = ctx.saved_tensors
        rows = gradient.reshape(-1, len(q))
        x_gradient, bias_gradient = None, rows.sum(0) if ctx.needs_input_grad[3] else None
        if ctx.needs_input_grad[0]:
            scaled = rows.mul(scale).to(rows.dtype)
            out = rows.new_empty(len(rows), q.shape[1])
            for start, stop in _tiles(q.shape[1], across=len(q)):
                torch.mm(scaled, q[:, start:stop].to(rows.dtype), out=out[:, start:stop])
            x_gradient = out.view(*gradient.shape[:-1], q.shape[1])
        return x_gradient, None, None, bias_gradient


def tile_rows(across: int) -> int:
    """The number of rows, of `across` elements each, that are in the compute dtype at once."""
    return max(_TILE_ELEMENTS // across // _ALIGNED, 1) * _ALIGNED


def _tiles(length: int, *, across: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of tiles of about `_TILE_ELEMENTS` over one dimension of a matrix, `across` being its other one."""
    step = tile_rows(across)
    for start in range(0, length, step):
        yield start, min(start + step, length)
