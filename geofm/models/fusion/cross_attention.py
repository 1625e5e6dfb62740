"""Cross-attention: the tokens of one sensor attend to those of all others."""

from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from geofm.models.fusion.protocol import FusionArgs, FusionKind, one_vit_per_sensor


class CrossAttentionBlock(nn.Module):
    """Cross-attention block with post-norm: attention, add, norm, MLP, add, norm.

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
        """Apply the block.

        Args:
            query: Query tokens of shape (B, L, D).
            context: Key and value tokens of shape (B, M, D).

        Returns:
            Tokens of shape (B, L, D).
        """
        attended, _ = self.attn(query, context, context, need_weights=False)
        query = self.norm1(query + self.drop(attended))
        return self.norm2(query + self.drop(self.mlp(query)))

    def attention(self, query: Tensor, context: Tensor) -> Tensor:
        """Compute attention weights before dropout, of shape (B, heads, L, M)."""
        training = self.attn.training
        self.attn.eval()
        _, weights = self.attn(query, context, context, average_attn_weights=False)
        self.attn.train(training)
        return weights


class CrossAttentionFusion(nn.Module):
    """Fusion in which the tokens of a query sensor attend to those of all other sensors.

    The output of a layer is the query of the next layer. In every layer, key and value are the
    tokens of the other sensors, concatenated along the sequence.

    Args:
        dim: Width of the tokens.
        query: Index of the query sensor.
        nhead: Number of attention heads.
        nlayer: Number of layers.
        dropout: Dropout in the block.
        shared: Whether all layers share one set of weights.
        sensors: Number of sensors.

    Raises:
        ValueError: If the width is not a multiple of *nhead*.
    """

    needs_every_token = True

    def __init__(
        self,
        dim: int,
        query: int = 0,
        nhead: int = 4,
        nlayer: int = 6,
        dropout: float = 0.0,
        shared: bool = True,
        sensors: int = 2,
    ) -> None:
        super().__init__()
        if dim % nhead:
            raise ValueError(f'cross-attention: width {dim} is not a multiple of nhead={nhead}')
        self.query = query
        self._others = tuple(i for i in range(sensors) if i != query)
        self.nlayer = nlayer
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(dim, nhead, dropout) for _ in range(1 if shared else nlayer)
        )

    @classmethod
    def build(cls, args: FusionArgs) -> Self:
        """Build the module of a model.

        Args:
            args: Arguments of the model.

        Returns:
            The module.

        Raises:
            ValueError: If the query is not one of the sensors, or the width does not fit.
        """
        if args.query not in args.sensors:
            raise ValueError(f"query must be one of {list(args.sensors)}, not '{args.query}'")
        query, count = args.sensors.index(args.query), len(args.sensors)
        return cls(args.dim, query, args.nhead, args.nlayer, args.dropout, args.shared, count)

    def _layers(self) -> list[CrossAttentionBlock]:
        blocks = cast(list[CrossAttentionBlock], list(self.blocks))
        return blocks * self.nlayer if len(blocks) == 1 else blocks

    def _split(self, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return query and context."""
        others = [tokens[i] for i in self._others]
        context = others[0] if len(others) == 1 else torch.cat(others, dim=1)
        return tokens[self.query], context

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Fuse tokens.

        Args:
            tokens: One tensor per sensor, each of shape (B, L, D).

        Returns:
            Fused tokens of shape (B, L, D).
        """
        query, context = self._split(tokens)
        for block in self._layers():
            query = block(query, context)
        return query

    def attention(self, tokens: Sequence[Tensor]) -> dict[int, Tensor]:
        """Compute the attention weights of the last layer.

        Args:
            tokens: One tensor per sensor, each of shape (B, L, D).

        Returns:
            A dictionary from the index of each sensor except the query sensor to the attention
            weights from the query tokens (rows) to the tokens of that sensor (columns), of shape
            (B, heads, L, L). The softmax is over the tokens of all these sensors.
        """
        query, context = self._split(tokens)
        *earlier, last = self._layers()
        for block in earlier:
            query = block(query, context)
        weights = last.attention(query, context).chunk(len(self._others), dim=-1)
        return dict(zip(self._others, weights, strict=True))

    def describe(self, sensors: Sequence[str]) -> str:
        """Describe the properties that must match to load weights of another module.

        Args:
            sensors: Keys of the model's sensors.

        Returns:
            The description.
        """
        block = self._layers()[0]
        return (
            f'xattn(query={sensors[self.query]}, nhead={block.attn.num_heads}, '
            f'nlayer={self.nlayer}, shared={len(self.blocks) == 1})'
        )


KIND = FusionKind(one_vit_per_sensor, CrossAttentionFusion.build)
