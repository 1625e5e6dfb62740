"""Linear fusion: tokens at the same position are concatenated and projected."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from geofm.models.fusion.protocol import FusionArgs, FusionKind, one_vit_per_sensor


class LinearFusion(nn.Module):
    """Fusion that concatenates the tokens of all sensors along the channels and projects them.

    Output token i depends on token i of each sensor only: Linear(S x D -> 4 D), LayerNorm, GELU,
    Linear(4 D -> D).

    Args:
        dim: Width D of the tokens.
        sensors: Number S of sensors.
    """

    needs_every_token = False

    def __init__(self, dim: int, sensors: int = 2) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(sensors * dim, 4 * dim),
            nn.LayerNorm(4 * dim),
            nn.GELU(),
            nn.Linear(4 * dim, dim),
        )

    @classmethod
    def build(cls, args: FusionArgs) -> Self:
        """Build the module of a model.

        Args:
            args: Arguments of the model.

        Returns:
            The module.
        """
        return cls(args.dim, len(args.sensors))

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Fuse tokens.

        Args:
            tokens: One tensor per sensor, each of shape (B, L, D).

        Returns:
            Fused tokens of shape (B, L, D).
        """
        return self.mlp(torch.cat(list(tokens), dim=-1))

    def attention(self, tokens: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return no attention: there is none between tokens at different positions.

        Args:
            tokens: One tensor per sensor, each of shape (B, L, D).

        Returns:
            An empty dictionary.
        """
        return {}

    def describe(self, sensors: Sequence[str]) -> str:
        """Describe the properties that must match to load weights of another module.

        Args:
            sensors: Keys of the model's sensors.

        Returns:
            The description.
        """
        return 'linear'


KIND = FusionKind(one_vit_per_sensor, LinearFusion.build)
