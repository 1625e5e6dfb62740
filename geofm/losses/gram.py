"""Gram anchoring: preserve the similarities between the patches of an image."""

from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss, normalize

from geofm.losses.precision import at_least_float32


class GramLoss(nn.Module):
    """Difference between the patch similarities of a student and an anchor.

    Simeoni et al., 2025, `DINOv3 <https://arxiv.org/abs/2508.10104>`_: long training makes patch
    features less local. The loss keeps the Gram matrix, the cosine similarities between all patches
    of an image, close to that of an earlier teacher. The features themselves may change.
    """

    def forward(self, student: Tensor, anchor: Tensor) -> Tensor:
        """Compute the loss of a batch.

        Args:
            student: Patch tokens of the student, of shape (B, N, D).
            anchor: Tokens of the same patches from the anchor, of shape (B, N, D').

        Returns:
            Mean squared difference of the similarities, over images and pairs of patches.
        """
        return mse_loss(_gram(student), _gram(anchor))


def _gram(tokens: Tensor) -> Tensor:
    directions = normalize(at_least_float32(tokens), dim=-1)
    return directions @ directions.mT


def resize_tokens(tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resize patch tokens to another grid, as DINOv3 does with tokens of larger crops.

    The interpolation is bicubic and antialiased.

    Args:
        tokens: Patch tokens of shape (B, h x w, D).
        grid: Current grid (h, w).
        size: New grid (H, W).

    Returns:
        Tokens of shape (B, H x W, D).
    """
    if grid == size:
        return tokens
    image = at_least_float32(tokens.mT.unflatten(2, grid))
    resized = interpolate(image, size, mode='bicubic', antialias=True)
    return resized.flatten(2).mT
