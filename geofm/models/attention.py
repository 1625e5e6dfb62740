"""Attention weights of a ViT, recorded in a forward pass, and attention rollout."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class TokensAndAttention(NamedTuple):
    """Tokens and attention weights of a forward pass.

    Attributes:
        tokens: Final tokens of shape (B, prefix + N, D), as returned by ``forward_features``.
        attention: For each source of attention, the attention weights from one query token to the
            patches, shape (B, heads, H/p, W/p). The softmax is over all tokens, so a map sums to 1
            minus the attention to CLS and registers.
        rollout: For each sensor, attention rollout from CLS to the patches, shape (B, H/p, W/p).
    """

    tokens: Tensor
    attention: dict[str, Tensor]
    rollout: dict[str, Tensor]


@contextmanager
def watch_attention(
    modules: Mapping[int, nn.Module], see: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Context in which attention weights are passed to a callback while a model runs.

    Fused kernels return no weights. Within this context the modules compute
    softmax(q k^T / sqrt(d)) with timm's implementation without fused kernels, so the output of the
    model stays the same.

    Args:
        modules: timm's attention modules by number.
        see: Callback for the number of a module and weights of shape (B, heads, L, L), called each
            time a module runs.

    Yields:
        Nothing.

    Raises:
        ValueError: If a module does not expose its weights.
    """
    handles, fused = [], {}
    for number, module in modules.items():
        attention: Any = module
        if not hasattr(attention, 'attn_drop') or not hasattr(attention, 'fused_attn'):
            raise ValueError(f'{type(module).__name__} does not expose its attention weights')
        fused[number] = attention.fused_attn
        attention.fused_attn = False

        def hook(_: nn.Module, args: tuple[Tensor, ...], number: int = number) -> None:
            see(number, args[0])

        # The input of the dropout is the softmax.
        handles.append(attention.attn_drop.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for number, attention in modules.items():
            attention.fused_attn = fused[number]
        for handle in handles:
            handle.remove()


def rollout_step(product: Tensor | None, weights: Tensor) -> Tensor:
    """Extend attention rollout by one block (Abnar & Zuidema, 2020).

    Heads are averaged, and the residual connection has the same weight as attention:
    R_i = (mean(A_i) + I) / 2 @ R_(i-1). All tokens including registers take part, so that each row
    of the product is a distribution over the input tokens.

    Args:
        product: Rollout up to the previous block, shape (B, L, L); None for the first block.
        weights: Attention weights of the block, shape (B, heads, L, L).

    Returns:
        Rollout up to this block, shape (B, L, L).
    """
    mean = weights.mean(dim=1)
    step = (mean + torch.eye(mean.shape[-1], device=mean.device, dtype=mean.dtype)) / 2
    return step if product is None else step @ product


@dataclass
class ObservedAttention:
    """Recorded attention of one ViT.

    Attributes:
        rows: Attention of the query token in one block, as returned by :func:`take_rows`.
        product: Attention rollout, shape (B, L, L).
    """

    rows: Tensor | None = field(default=None)
    product: Tensor | None = field(default=None)


@contextmanager
def observe_blocks(
    blocks: Sequence[nn.Module], block: int | None, query: Tensor | None, rollout: bool
) -> Iterator[ObservedAttention]:
    """Context that records the attention of a ViT while it runs.

    Args:
        blocks: Blocks of the ViT, each with an ``attn`` of timm.
        block: Index of the block whose attention is recorded; None: none.
        query: Index of the query token of each sample, see :func:`take_rows`. None: CLS.
        rollout: Whether to compute attention rollout over all blocks.

    Yields:
        The recorded attention, complete after the forward pass.

    Raises:
        ValueError: If a block does not expose its attention.
    """
    seen = ObservedAttention()

    def see(depth: int, weights: Tensor) -> None:
        if depth == block:
            seen.rows = take_rows(weights, query)
        if rollout:
            seen.product = rollout_step(seen.product, weights)

    watched = range(len(blocks)) if rollout else [] if block is None else [block]
    modules = {depth: _attention_of(blocks[depth]) for depth in watched}
    with watch_attention(modules, see):
        yield seen


def _attention_of(block: nn.Module) -> nn.Module:
    attention = getattr(block, 'attn', None)
    if not isinstance(attention, nn.Module):
        raise ValueError(f'{type(block).__name__} does not expose its attention')
    return attention


def take_rows(weights: Tensor, query: Tensor | None) -> Tensor:
    """Select the attention of one or several query tokens of each sample.

    Args:
        weights: Attention weights, shape (B, heads, L, M).
        query: Index of the query token of each sample, int64 of shape (B,), or of Q query tokens,
            (B, Q). None: the first token, CLS.

    Returns:
        Weights of shape (B, heads, M), or (B, Q, heads, M) for Q query tokens.
    """
    if query is None:
        return weights[:, :, 0]
    if query.ndim == 2:
        return weights[torch.arange(len(weights), device=weights.device)[:, None], :, query]
    return weights[torch.arange(len(weights), device=weights.device), :, query]


def block_index(block: int, depth: int) -> int:
    """Convert the index of a block to a non-negative one.

    Args:
        block: Index; negative indices count from the end.
        depth: Number of blocks.

    Returns:
        The index.

    Raises:
        IndexError: If there is no such block.
    """
    if not -depth <= block < depth:
        raise IndexError(f'block {block}: the model has {depth} blocks')
    return block % depth
