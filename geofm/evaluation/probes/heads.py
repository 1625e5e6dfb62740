"""Many linear heads at once: those of all learning rates and inputs in one matrix product."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Literal

import torch
from rich.progress import track
from torch import Tensor

#: What turns outputs into predictions, and so which loss: cross-entropy, binary cross-entropy for
#: each class, half the squared error.
Link = Literal['softmax', 'sigmoid', 'identity']

#: Momentum of SGD, as in DINOv2.
MOMENTUM = 0.9

#: Batch for which DINOv2 states its learning rates.
_REFERENCE_BATCH = 256


@dataclass(frozen=True, slots=True)
class Heads:
    """Linear heads, side by side.

    Attributes:
        weight: Of shape (F, H, C): F features, H heads, C outputs; 0 where a head does not look.
        bias: Of shape (H, C).
        mean: Mean of each feature over the training data, of shape (F,).
        scale: 1 / standard deviation of each feature, of shape (F,).
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor

    def head(self, index: int) -> tuple[Tensor, Tensor]:
        """One head as a linear layer on features as they come.

        Args:
            index: Which.

        Returns:
            Weight (F, C) and bias (C,).
        """
        weight = self.weight[:, index] * self.scale[:, None]
        return weight, self.bias[index] - self.mean @ weight

    def outputs(self, features: Tensor, index: int) -> Tensor:
        """Outputs of one head.

        Args:
            features: Features of shape (N, F).
            index: Which head.

        Returns:
            Outputs of shape (N, C).
        """
        weight, bias = self.head(index)
        return features @ weight + bias


def train_heads(
    features: Tensor,
    targets: Tensor,
    looks_at: Tensor,
    learning_rates: Sequence[float],
    link: Link,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    weights: Tensor | None = None,
    description: str | None = None,
) -> Heads:
    """Train linear heads by SGD with momentum and a cosine schedule, as DINOv2's linear probe.

    A head sees the features that *looks_at* says. Features are brought to zero mean and unit
    variance first (as by the BatchNorm of MAE's linear probe; without it, features of any scale but
    a LayerNorm's would need learning rates of their own). Heads start at zero. The gradient is
    written out: for all three links it is the features times (prediction - target).

    Args:
        features: Features of shape (N, F).
        targets: Targets of shape (N, C): one-hot or fractions of classes, 0 and 1, or values.
        looks_at: Features that each head uses, bool of shape (F, H).
        learning_rates: Learning rate of each head for a batch of 256; scaled with the batch.
        link: From outputs to predictions.
        steps: Number of steps.
        batch_size: Rows in a step.
        generator: Draws the batches.
        weights: How much each row counts, of shape (N,); None: all the same.
        description: Text of a progress bar; None shows none.

    Returns:
        The heads. One whose learning rate was too high may hold NaN.
    """
    count, width = features.shape
    heads, outputs = looks_at.shape[1], targets.shape[1]
    mean = features.mean(dim=0)
    deviation = features.std(dim=0, correction=0)
    scale = torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), torch.zeros(()))
    batch_size = min(batch_size, count)
    rates = torch.tensor(learning_rates).repeat_interleave(outputs) * batch_size / _REFERENCE_BATCH
    mask = looks_at.repeat_interleave(outputs, dim=1).to(features.dtype)
    weight, bias = torch.zeros(width, heads * outputs), torch.zeros(heads * outputs)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    everything = torch.ones(count) if weights is None else weights
    batches: Iterable[Tensor] = _batches(count, batch_size, steps, generator)
    if description is not None:
        batches = track(batches, description, steps)
    for step, rows in enumerate(batches):
        x = (features[rows] - mean) * scale
        z = torch.addmm(bias, x, weight).view(len(rows), heads, outputs)
        error = _predict(z, link) - targets[rows, None]
        counts = everything[rows]
        error *= (counts / counts.sum().clamp_min(1e-12))[:, None, None]
        error = error.flatten(1)
        rate = rates * (0.5 * (1 + cos(pi * step / steps)))
        weight_velocity.mul_(MOMENTUM).addmm_(x.T, error)
        bias_velocity.mul_(MOMENTUM).add_(error.sum(dim=0))
        weight.addcmul_(weight_velocity * mask, rate, value=-1)
        bias.addcmul_(bias_velocity, rate, value=-1)
    shape = (heads, outputs)
    return Heads(weight.view(width, *shape), bias.view(shape), mean, scale)


def _predict(outputs: Tensor, link: Link) -> Tensor:
    if link == 'softmax':
        return outputs.softmax(dim=-1)
    return outputs.sigmoid() if link == 'sigmoid' else outputs


def _batches(
    count: int, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Rows of each step: epoch after epoch in a new order, without what is left at its end."""
    drawn = 0
    while drawn < steps:
        order = torch.randperm(count, generator=generator)
        for rows in order[: count - count % batch_size].split(batch_size)[: steps - drawn]:
            drawn += 1
            yield rows
