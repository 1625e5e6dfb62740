"""Attention weights of a ViT, seen while it runs, and what they add up to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Observation(NamedTuple):
    """What one forward pass shows of a batch.

    Attributes:
        tokens: Final tokens, shape (B, prefix + N, D), as ``forward_features`` gives them.
        attention: For each source of attention, the row of one token over the patches, shape
            (B, heads, H/p, W/p). The softmax was over all tokens, so a map sums to what the token
            does not give to CLS and the registers.
        rollout: For each sensor, attention rollout from CLS to the patches, shape (B, H/p, W/p).
    """

    tokens: Tensor
    attention: dict[str, Tensor]
    rollout: dict[str, Tensor]


@contextmanager
def watch_attention(
    modules: Mapping[int, nn.Module], see: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """See the attention weights of modules while a model runs.

    Fused kernels return no weights. Within this context the modules compute
    softmax(q k^T / sqrt(d)) in the open, as timm does where there is no such kernel, so the model
    returns what it always does.

    Args:
        modules: timm's attention modules, by a number that tells them apart.
        see: Called with that number and weights of shape (B, heads, L, L) each time one runs.

    Yields:
        Nothing.

    Raises:
        ValueError: If a module keeps its weights to itself.
    """
    handles, fused = [], {}
    for number, module in modules.items():
        attention: Any = module
        if not hasattr(attention, 'attn_drop') or not hasattr(attention, 'fused_attn'):
            raise ValueError(f'{type(module).__name__} does not show its attention weights')
        fused[number] = attention.fused_attn
        attention.fused_attn = False

        def hook(_: nn.Module, args: tuple[Tensor, ...], number: int = number) -> None:
            see(number, args[0])

        # The weights pass through dropout: before it they are the softmax itself.
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

    Heads are averaged, and the residual connection counts as much as attention:
    R_i = (mean(A_i) + I) / 2 @ R_(i-1). Every token takes part, registers too, so that each row
    of the product stays a distribution over the input tokens.

    Args:
        product: Rollout up to the block before, shape (B, L, L); None for the first block.
        weights: Attention weights of the block, shape (B, heads, L, L).

    Returns:
        Rollout up to this block, shape (B, L, L).
    """
    mean = weights.mean(dim=1)
    step = (mean + torch.eye(mean.shape[-1], device=mean.device, dtype=mean.dtype)) / 2
    return step if product is None else step @ product


@dataclass
class Seen:
    """What was asked for of one ViT.

    Attributes:
        rows: Attention of the asking token in one block, as :func:`take_rows` gives it.
        product: Attention rollout, shape (B, L, L).
    """

    rows: Tensor | None = field(default=None)
    product: Tensor | None = field(default=None)


@contextmanager
def observe_blocks(
    blocks: Sequence[nn.Module], block: int | None, query: Tensor | None, rollout: bool
) -> Iterator[Seen]:
    """Observe the blocks of a ViT while it runs.

    Args:
        blocks: Its blocks, each with an ``attn`` of timm.
        block: Block whose attention to keep; None: of none.
        query: Index of the asking token of each sample, see :func:`take_rows`. None: CLS.
        rollout: Whether to roll attention out, over all blocks.

    Yields:
        What is seen; complete when the model has run.

    Raises:
        ValueError: If the attention of a block cannot be seen.
    """
    seen = Seen()

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
        raise ValueError(f'{type(block).__name__} has no attention that could be shown')
    return attention


def take_rows(weights: Tensor, query: Tensor | None) -> Tensor:
    """Attention of one token, or of several, of each sample.

    Args:
        weights: Attention weights, shape (B, heads, L, M).
        query: Index of the token of each sample, int64 of shape (B,), or of Q tokens, (B, Q).
            None: the first, CLS.

    Returns:
        Its rows, shape (B, heads, M), or those of each of Q tokens, (B, Q, heads, M).
    """
    if query is None:
        return weights[:, :, 0]
    if query.ndim == 2:
        return weights[torch.arange(len(weights), device=weights.device)[:, None], :, query]
    return weights[torch.arange(len(weights), device=weights.device), :, query]


def block_index(block: int, depth: int) -> int:
    """Index of a block from 0.

    Args:
        block: Index, negative from the end.
        depth: Number of blocks.

    Returns:
        The index.

    Raises:
        IndexError: If there is no such block.
    """
    if not -depth <= block < depth:
        raise IndexError(f'block {block}: the model has {depth} blocks')
    return block % depth
