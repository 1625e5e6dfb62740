"""Regression of a teacher's features, for distillation."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, smooth_l1_loss

from geofm.losses.precision import at_least_float32
from geofm.losses.ranks import reduced

#: Smallest standard deviation of a channel, relative to that of all: a constant one stays so.
_SMALLEST = 0.01


class FeatureLoss(nn.Module):
    """Cosine distance and smooth L1 to standardised features.

    Sariyildiz et al., 2024, `UNIC <https://arxiv.org/abs/2408.05088>`_. Mean and standard deviation
    of each channel of the teacher are moving averages, over the features of all ranks: without
    them, a few large channels are all that is learned.

    Args:
        dim: Channels D of the teacher's features.
        momentum: Fraction of the averages that a batch replaces, once there are many.
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
        """Move the averages towards those of a batch; the first batches count alike.

        Args:
            features: The teacher's, of shape (N, D).
            counted: Which of them count, bool of shape (N,). Default: all.
        """
        features = at_least_float32(features)
        weights = torch.ones_like(features[:, 0]) if counted is None else counted.to(features)
        sums = torch.stack([weights @ features, weights @ features.square()])
        # One collective for all.
        total = reduced(torch.cat([sums.flatten(), weights.sum()[None]]))
        mean, square = (total[:-1] / total[-1].clamp_min(1)).chunk(2)
        share = torch.clamp_min(1 / (self.batches + 1), self.momentum) * (total[-1] > 0)
        self.mean.lerp_(mean, share)
        self.square.lerp_(square, share)
        self.batches.add_((total[-1] > 0).to(self.batches))

    def standardized(self, features: Tensor) -> Tensor:
        """Standardise a teacher's features.

        Args:
            features: Of shape (..., D).

        Returns:
            The same shape, each channel with mean 0 and standard deviation 1 on average.
        """
        std = (self.square - self.mean.square()).clamp_min(0).sqrt()
        return (at_least_float32(features) - self.mean) / std.clamp_min(_SMALLEST * std.mean())

    def forward(
        self, predictions: Tensor, features: Tensor, counted: Tensor | None = None
    ) -> Tensor:
        """Loss of a batch.

        Args:
            predictions: What the student predicts of standardised features, of shape (N, D).
            features: The teacher's, as they are, of shape (N, D).
            counted: Which of them count, bool of shape (N,). Default: all.

        Returns:
            Mean over those that count; 0 if none do.
        """
        targets = self.standardized(features)
        predictions = at_least_float32(predictions)
        distances = 1 - cosine_similarity(predictions, targets, dim=-1)
        distances = distances + smooth_l1_loss(predictions, targets, reduction='none').mean(dim=-1)
        if counted is None:
            return distances.mean()
        weights = counted.to(distances)
        return (distances * weights).sum() / weights.sum().clamp_min(1)
