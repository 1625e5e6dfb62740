"""Small decoder that predicts masked patches, as in MAE."""

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class MaskedDecoder(nn.Module):
    """Decoder that predicts values of masked patches from the tokens of visible patches.

    It follows He et al., 2022, `MAE <https://arxiv.org/abs/2111.06377>`_. Only some of the masked
    patches are predicted at a time, as in Fu et al., 2024,
    `CrossMAE <https://arxiv.org/abs/2401.14391>`_. Positions are fixed sines and cosines, so any
    grid can be used.
    """

    def __init__(self, embed_dim: int, out_dim: int, depth: int = 1, num_heads: int = 4) -> None:
        """Initialize a new MaskedDecoder instance.

        Args:
            embed_dim: Length D of a token, a multiple of 4 and of *num_heads*.
            out_dim: Length of a prediction.
            depth: Number of blocks.
            num_heads: Number of attention heads of each block.
        """
        super().__init__()
        self.embed = nn.Linear(embed_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, out_dim)

    def forward(
        self, cls: Tensor, tokens: Tensor, visible: Tensor, wanted: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Predict values of patches.

        Args:
            cls: CLS tokens, (B, D).
            tokens: Tokens of the visible patches, (B, V, D).
            visible: Indices of the visible patches, int64 (B, V).
            wanted: Indices of the patches to predict, int64 (B, W).
            grid: Number of rows and columns of patches.

        Returns:
            Predictions, (B, W, out_dim).
        """
        positions = build_sincos2d_pos_embed(list(grid), cls.shape[-1], device=cls.device)
        shown = self.embed(torch.cat([cls[:, None], tokens], dim=1))
        placed = shown[:, 1:] + positions[visible].to(shown.dtype)
        wanted_tokens = (self.mask_token + positions[wanted]).to(shown.dtype)
        x = self.blocks(torch.cat([shown[:, :1], placed, wanted_tokens], dim=1))
        out: Tensor = self.head(self.norm(x[:, -wanted.shape[1] :]))
        return out
