"""Losses of features: those of a frozen teacher, and Gram anchoring."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate, mse_loss, normalize, smooth_l1_loss

from geofm.losses.precision import at_least_float32
from geofm.losses.ranks import reduced

#: Lower bound of a channel's standard deviation, relative to the mean over channels. It keeps
#: constant channels constant.
_SMALLEST = 0.01


class FeatureLoss(nn.Module):
    """Cosine distance plus smooth L1 distance to standardised features.

    Sariyildiz et al., 2024, `UNIC <https://arxiv.org/abs/2408.05088>`_. Each channel of the teacher
    is standardised with moving averages of its mean and standard deviation over all ranks. Without
    this, a few channels of large magnitude dominate the loss.

    Args:
        dim: Number D of channels of the teacher's features.
        momentum: Weight of a new batch in the moving averages. The first batches have a larger
            weight, so that the averages start as plain means.
    """

    mean: Tensor
    square: Tensor
    batches: Tensor

    def __init__(self, dim: int, momentum: float = 0.01) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer('mean', torch.zeros(dim))
        self.register_buffer('square', torch.ones(dim))
        self.register_buffer('batches', torch.zeros(()))

    @torch.no_grad()
    def update(self, features: Tensor, counted: Tensor | None = None) -> None:
        """Update the moving averages with a batch.

        Args:
            features: Features of the teacher, of shape (N, D).
            counted: Which rows to use, bool of shape (N,). Default: all.
        """
        features = at_least_float32(features)
        weights = torch.ones_like(features[:, 0]) if counted is None else counted.to(features)
        sums = torch.stack([weights @ features, weights @ features.square()])
        # Reduce everything in one collective.
        total = reduced(torch.cat([sums.flatten(), weights.sum()[None]]))
        mean, square = (total[:-1] / total[-1].clamp_min(1)).chunk(2)
        share = torch.clamp_min(1 / (self.batches + 1), self.momentum) * (total[-1] > 0)
        self.mean.lerp_(mean, share)
        self.square.lerp_(square, share)
        self.batches.add_((total[-1] > 0).to(self.batches))

    def standardized(self, features: Tensor) -> Tensor:
        """Standardise a teacher's features.

        Args:
            features: Features of shape (..., D).

        Returns:
            Features of the same shape; each channel has mean 0 and standard deviation 1 on average.
        """
        std = (self.square - self.mean.square()).clamp_min(0).sqrt()
        return (at_least_float32(features) - self.mean) / std.clamp_min(_SMALLEST * std.mean())

    def forward(
        self, predictions: Tensor, features: Tensor, counted: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of a batch.

        Args:
            predictions: The student's predictions of the standardised features, of shape (N, D).
            features: Features of the teacher, not standardised, of shape (N, D).
            counted: Which rows to use, bool of shape (N,). Default: all.

        Returns:
            Mean loss over the rows used; 0 if there are none.
        """
        targets = self.standardized(features)
        predictions = at_least_float32(predictions)
        distances = 1 - cosine_similarity(predictions, targets, dim=-1)
        distances = distances + smooth_l1_loss(predictions, targets, reduction='none').mean(dim=-1)
        if counted is None:
            return distances.mean()
        weights = counted.to(distances)
        return (distances * weights).sum() / weights.sum().clamp_min(1)


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
