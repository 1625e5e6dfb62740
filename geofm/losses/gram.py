"""Gram anchoring: keep how alike the patches of an image are to one another."""

from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss, normalize

from geofm.losses.precision import at_least_float32


class GramLoss(nn.Module):
    """Difference between the student's and an anchor's similarities of patches.

    Simeoni et al., 2025, `DINOv3 <https://arxiv.org/abs/2508.10104>`_: long training makes patch
    features less local. The matrix of cosine similarities between all patches of an image, the
    Gram matrix, is held to that of an earlier teacher; the features themselves are free to move.
    """

    def forward(self, student: Tensor, anchor: Tensor) -> Tensor:
        """Loss of a batch.

        Args:
            student: Patch tokens of shape (B, N, D).
            anchor: Patch tokens of the same patches, of shape (B, N, D').

        Returns:
            Mean squared difference of the similarities, over images and pairs of patches.
        """
        return mse_loss(_gram(student), _gram(anchor))


def _gram(tokens: Tensor) -> Tensor:
    directions = normalize(at_least_float32(tokens), dim=-1)
    return directions @ directions.mT


def resize_tokens(tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resize patch tokens to another grid, as DINOv3 does with those of larger crops.

    Args:
        tokens: Patch tokens of shape (B, h x w, D).
        grid: Their grid (h, w).
        size: Grid (H, W) that is wanted.

    Returns:
        Tokens of shape (B, H x W, D), bicubic and antialiased.
    """
    if grid == size:
        return tokens
    image = at_least_float32(tokens.mT.unflatten(2, grid))
    resized = interpolate(image, size, mode='bicubic', antialias=True)
    return resized.flatten(2).mT
