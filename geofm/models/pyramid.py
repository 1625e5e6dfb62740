"""Feature pyramid from the last feature map of a plain ViT."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn


class SimpleFeaturePyramid(nn.Module):
    """Simple feature pyramid on the last map of a plain ViT (ViTDet; Li et al., 2022).

    With patches of 16 px, two transposed convolutions produce stride 4, one produces stride 8, and
    max pooling produces stride 32. A 1 x 1 and a 3 x 3 convolution follow. Each level starts from
    the ViT's map. LayerNorm follows each convolution, as in ViTDet.

    A patch size that is not a power of two is treated as the nearest power of two. Each map is then
    resized to its stride by antialiased bilinear interpolation. For example, with patches of 14 px
    and images of 224 px, maps of 64, 32, 16 and 8 px become 56, 28, 14 and 7 px.

    Args:
        embed_dim: Width of the ViT.
        patch_size: Side of its patches in pixels.
        strides: Pixels of the image per pixel of each map, powers of two.
        width: Channels of each map.
    """

    def __init__(
        self,
        embed_dim: int,
        patch_size: int,
        strides: Sequence[int] = (4, 8, 16, 32),
        width: int = 256,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.width = width
        octaves = round(math.log2(patch_size))
        self.levels = nn.ModuleList(
            _Level(embed_dim, width, octaves - round(math.log2(stride))) for stride in strides
        )

    def forward(self, x: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """Compute the maps.

        Args:
            x: Map of the ViT, of shape (B, D, H/p, W/p).
            size: Height H and width W of the image, multiples of all strides.

        Returns:
            A map of shape (B, width, H/s, W/s) for each stride s.
        """
        return [
            level(x, (size[0] // stride, size[1] // stride))
            for level, stride in zip(self.levels, self.strides, strict=True)
        ]


class _Level(nn.Module):
    """Level of the pyramid: the ViT's map scaled by 2 to the power of *octaves*."""

    def __init__(self, dim: int, width: int, octaves: int) -> None:
        super().__init__()
        self.scale = nn.Sequential()
        for i in range(octaves):
            if i:
                self.scale.extend([LayerNorm2d(dim), nn.GELU()])
            self.scale.append(nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2))
            dim //= 2
        if octaves < 0:
            self.scale.append(nn.MaxPool2d(2**-octaves))
        self.output = nn.Sequential(
            nn.Conv2d(dim, width, kernel_size=1, bias=False),
            LayerNorm2d(width),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(width),
        )

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.scale(x)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode='bilinear', antialias=True)
        output: Tensor = self.output(x)
        return output
