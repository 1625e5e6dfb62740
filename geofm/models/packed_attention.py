"""Attention within each sequence of a packed tensor, by the best method available."""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import scaled_dot_product_attention

from geofm.device import to_device

#: Implementation of attention within each sequence of a packed tensor.
Method = Literal['sdpa', 'varlen', 'xformers']

#: Groups of equally long sequences in a packed tensor: number of sequences, and tokens of each.
Groups = tuple[tuple[int, int], ...]

#: Lowest compute capability for PyTorch's flash attention for packed sequences.
_FLASH_CAPABILITY = (8, 0)


@lru_cache
def choose_attention(device: torch.device, dtype: torch.dtype) -> tuple[Method, str]:
    """Choose the implementation of packed attention.

    Args:
        device: Device of the queries.
        dtype: Data type of the queries: that of autocast if it is enabled.

    Returns:
        The method, and the reason for messages.
    """
    if device.type != 'cuda':
        return 'sdpa', f'per crop size: packed kernels need CUDA, the device is {device.type}'
    half = dtype in (torch.float16, torch.bfloat16)
    if half and torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY and _has_varlen():
        return 'varlen', "PyTorch's flash attention for packed sequences"
    if not _has_xformers():
        return 'sdpa', 'per crop size: neither varlen attention nor xformers can run here'
    return 'xformers', 'memory-efficient attention over a block-diagonal mask'


def _has_varlen() -> bool:
    return importlib.util.find_spec('torch.nn.attention.varlen') is not None


def _has_xformers() -> bool:
    """Return whether xformers is installed and its extension loads."""
    if importlib.util.find_spec('xformers') is None:
        return False
    try:
        from xformers.ops import fmha
    except (ImportError, OSError):
        return False
    return any(bool(op.is_available()) for op in fmha.ALL_FW_OPS)


def attend(
    qkv: Tensor,
    groups: Groups,
    dropout: float = 0.0,
    method: Method | None = None,
    nested: bool = True,
) -> Tensor:
    """Compute self-attention within each sequence of a packed tensor.

    Args:
        qkv: Queries, keys and values of shape (T, 3, heads, d).
        groups: Groups of the sequences in the T rows.
        dropout: Dropout probability of the attention weights.
        method: Implementation. Default: see :func:`choose_attention`.
        nested: Whether to compute gradients with nested autograd graphs, which is faster but not
            supported by selective activation checkpointing.

    Returns:
        Tokens of shape (T, heads x d).
    """
    method = method or choose_attention(qkv.device, qkv.dtype)[0]
    if method == 'sdpa' or dropout:
        return (_per_size if nested else _plainly_per_size)(qkv, groups, dropout)
    query, key, value = qkv.unbind(1)
    if method == 'varlen':
        from torch.nn.attention.varlen import varlen_attn

        starts, longest = _starts(groups, qkv.device)
        attended: Any = varlen_attn(query, key, value, starts, starts, longest, longest)
    else:
        from xformers.ops import memory_efficient_attention

        packed = [part[None] for part in (query, key, value)]
        attended = memory_efficient_attention(
            *packed, attn_bias=_block_diagonal(groups, qkv.device)
        )[0]
    return attended.flatten(1)


class _PerSize(torch.autograd.Function):
    """PyTorch's attention for the sequences of each length in turn.

    With plain operations, the backward pass would copy the gradients of queries, keys and values
    three times to collect them in one packed tensor. Here they are copied once.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, groups: Groups, dropout: float) -> Tensor:
        attended = qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3])
        ctx.groups, ctx.heads, ctx.parts = groups, qkv.shape[2], []
        parts = zip(
            _by_size(attended.unflatten(1, qkv.shape[2:]), groups),
            _by_size(qkv, groups),
            strict=True,
        )
        for out, part in parts:
            with torch.set_grad_enabled(qkv.requires_grad), _no_autocast(qkv):
                anchor = qkv.new_empty(0, requires_grad=qkv.requires_grad)
                inputs = _computed_in(part).permute(2, 0, 3, 1, 4)
                query, key, value = (_Input.apply(anchor, x) for x in inputs)
                result = scaled_dot_product_attention(query, key, value, dropout_p=dropout)
            out.copy_(result.detach().transpose(1, 2))
            if qkv.requires_grad:
                # Keep edges of the graph instead of tensors, so that activation checkpointing can
                # free the tensors.
                edges = [get_gradient_edge(x) for x in (query, key, value)]
                ctx.parts.append((get_gradient_edge(result), edges))
        return attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        heads, width = ctx.heads, grad.shape[1] // ctx.heads
        gradient = grad.new_empty(len(grad), 3, heads, width)
        grads = _by_size(grad.unflatten(1, (heads, width)), ctx.groups)
        for (result, edges), of_result, place in zip(
            ctx.parts, grads, _by_size(gradient, ctx.groups), strict=True
        ):
            found = torch.autograd.grad([result], edges, [_computed_in(of_result).transpose(1, 2)])
            for i, of_input in enumerate(found):
                place[:, :, i].copy_(of_input.transpose(1, 2))
        return gradient, None, None


#: torch.compile cannot trace the nested graphs.
_per_size: Callable[[Tensor, Groups, float], Tensor] = torch.compiler.disable(_PerSize.apply)


def _plainly_per_size(qkv: Tensor, groups: Groups, dropout: float) -> Tensor:
    """Compute the same as :class:`_PerSize` with plain operations."""
    attended = []
    for part in _by_size(qkv, groups):
        with _no_autocast(qkv):
            query, key, value = _computed_in(part).permute(2, 0, 3, 1, 4)
            result = scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        attended.append(result.transpose(1, 2).flatten(0, 1).flatten(1).to(qkv.dtype))
    return torch.cat(attended)


class _Input(torch.autograd.Function):
    """Identity that starts a nested graph without a leaf that would hold the tensor."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _computed_in(x: Tensor) -> Tensor:
    """Convert half precision to float32 on a CPU, where half precision is several times slower."""
    return x.float() if x.is_cpu and x.dtype in (torch.float16, torch.bfloat16) else x


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast('cpu', enabled=False) if x.is_cpu else nullcontext()


def _by_size(packed: Tensor, groups: Groups) -> list[Tensor]:
    """Return views of the sequences of each length, of shape (B, L, ...)."""
    parts = packed.split([count * length for count, length in groups])
    return [part.unflatten(0, group) for part, group in zip(parts, groups, strict=True)]


@lru_cache(maxsize=64)
def _starts(groups: Groups, device: torch.device) -> tuple[Tensor, int]:
    """Return the start of each sequence, with the end of the last; and the largest length."""
    lengths = [length for count, length in groups for _ in range(count)]
    # Cached between validation and training, so it must not be a tensor of inference mode.
    with torch.inference_mode(False):
        starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return to_device(starts, device), max(lengths)


@lru_cache(maxsize=64)
def _block_diagonal(groups: Groups, device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths = [length for count, length in groups for _ in range(count)]
    with torch.inference_mode(False):
        return BlockDiagonalMask.from_seqlens(lengths, device=device)
