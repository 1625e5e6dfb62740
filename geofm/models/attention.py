"""Attention weights of a timm ViT block, computed in the open."""

from typing import Any

import torch
from torch import Tensor, nn


def cls_attention_weights(block: nn.Module, tokens: Tensor) -> Tensor:
    """Attention of the CLS token in one block: softmax(q k^T / sqrt(d)).

    Fused attention kernels return no weights, so they are computed here from the block's own
    projections; only the CLS row is.

    Args:
        block: Block of a timm ``VisionTransformer``.
        tokens: Input of the block, of shape (B, L, D), CLS first.

    Returns:
        Weights of shape (B, heads, L), each row summing to 1.
    """
    attn: Any = block.attn
    norm1: Any = block.norm1
    batch, length, _ = tokens.shape
    qkv = attn.qkv(norm1(tokens))
    q, k, _ = qkv.reshape(batch, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q[:, :, :1]), attn.k_norm(k)
    weights: Tensor = torch.softmax(q * attn.scale @ k.mT, dim=-1)
    return weights.squeeze(2)
