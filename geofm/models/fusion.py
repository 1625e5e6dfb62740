"""Fusion of the token sequences of two sensors into one."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn


class LinearFusion(nn.Module):
    """Concatenate the sensors' tokens along the channels and project them back.

    Token i of the output depends on token i of each sensor alone:
    Linear(S x D -> 4 D), LayerNorm, GELU, Linear(4 D -> D).

    Args:
        dim: Width D of the tokens.
        sensors: Number S of sensors.
    """

    def __init__(self, dim: int, sensors: int = 2) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(sensors * dim, 4 * dim),
            nn.LayerNorm(4 * dim),
            nn.GELU(),
            nn.Linear(4 * dim, dim),
        )

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Fuse tokens.

        Args:
            tokens: One tensor a sensor, each of shape (B, L, D).

        Returns:
            Fused tokens of shape (B, L, D).
        """
        return self.mlp(torch.cat(list(tokens), dim=-1))


class CrossAttentionBlock(nn.Module):
    """Post-norm cross-attention block: attention, add, norm, MLP, add, norm.

    Args:
        dim: Width of the tokens.
        num_heads: Number of attention heads.
        dropout: Dropout of the attention weights and of both residual branches.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim)
        )
        self.norm2 = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """Let the query attend to the context.

        Args:
            query: Tokens of shape (B, L, D).
            context: Tokens of shape (B, M, D), key and value.

        Returns:
            Tokens of shape (B, L, D).
        """
        attended, _ = self.attn(query, context, context, need_weights=False)
        query = self.norm1(query + self.drop(attended))
        return self.norm2(query + self.drop(self.mlp(query)))

    def attention(self, query: Tensor, context: Tensor) -> Tensor:
        """Attention weights, before dropout, of shape (B, heads, L, M)."""
        training = self.attn.training
        self.attn.eval()
        _, weights = self.attn(query, context, context, average_attn_weights=False)
        self.attn.train(training)
        return weights


class CrossAttentionFusion(nn.Module):
    """One sensor's tokens, the query, attend to the other's, again and again.

    The output of a layer is the query of the next; key and value stay the other sensor's tokens.

    Args:
        dim: Width of the tokens.
        query: Index of the sensor that asks: 0 or 1.
        nhead: Number of attention heads.
        nlayer: How many times the block is applied.
        dropout: Dropout in the block.
        shared: One set of weights for all layers, or one a layer.
    """

    def __init__(
        self,
        dim: int,
        query: Literal[0, 1] = 0,
        nhead: int = 4,
        nlayer: int = 6,
        dropout: float = 0.0,
        shared: bool = True,
    ) -> None:
        super().__init__()
        if dim % nhead:
            raise ValueError(f'cross-attention: width {dim} is not a multiple of nhead={nhead}')
        self.query = query
        self.nlayer = nlayer
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(dim, nhead, dropout) for _ in range(1 if shared else nlayer)
        )

    def _layers(self) -> list[CrossAttentionBlock]:
        blocks = [block for block in self.blocks if isinstance(block, CrossAttentionBlock)]
        return blocks * self.nlayer if len(blocks) == 1 else blocks

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Fuse tokens.

        Args:
            tokens: Tokens of the two sensors, each of shape (B, L, D).

        Returns:
            Fused tokens of shape (B, L, D).
        """
        query, context = tokens[self.query], tokens[1 - self.query]
        for block in self._layers():
            query = block(query, context)
        return query

    def attention(self, tokens: Sequence[Tensor]) -> Tensor:
        """Attention of the last layer.

        Args:
            tokens: Tokens of the two sensors, each of shape (B, L, D).

        Returns:
            Weights of shape (B, heads, L, L): query token, then token of the other sensor.
        """
        query, context = tokens[self.query], tokens[1 - self.query]
        *earlier, last = self._layers()
        for block in earlier:
            query = block(query, context)
        return last.attention(query, context)
