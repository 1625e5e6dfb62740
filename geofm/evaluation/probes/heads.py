"""Training many linear heads at once, for all learning rates and inputs, in one matrix product."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Literal

import torch
from rich.progress import track
from torch import Tensor

#: Function that converts outputs to predictions. It determines the loss: cross-entropy, binary
#: cross-entropy per class, or half the squared error.
Link = Literal['softmax', 'sigmoid', 'identity']

#: Momentum of SGD, as in DINOv2.
MOMENTUM = 0.9

#: Batch size for which DINOv2's learning rates are given.
_REFERENCE_BATCH = 256


@dataclass(frozen=True, slots=True)
class Heads:
    """Linear heads that were trained together.

    Attributes:
        weight: Weights of shape (F, H, C) for F features, H heads and C outputs; 0 for features
            that a head does not use.
        bias: Biases of shape (H, C).
        mean: Mean of each feature over the training data, of shape (F,).
        scale: 1 / standard deviation of each feature, of shape (F,).
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor

    def head(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a head as a linear layer on features that are not standardised.

        Args:
            index: Index of the head.

        Returns:
            Weight (F, C) and bias (C,).
        """
        weight = self.weight[:, index] * self.scale[:, None]
        return weight, self.bias[index] - self.mean @ weight

    def outputs(self, features: Tensor, index: int) -> Tensor:
        """Compute the outputs of a head.

        Args:
            features: Features of shape (N, F).
            index: Index of the head.

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

    Features are standardised first, as by the BatchNorm of MAE's linear probe. Otherwise, features
    of another scale than that of a LayerNorm would need other learning rates. Heads are initialised
    with zeros. The gradient is computed explicitly: for all three links, it is the features times
    (prediction - target).

    Args:
        features: Features of shape (N, F).
        targets: Targets of shape (N, C): one-hot vectors or fractions of classes, 0 and 1, or
            values.
        looks_at: Which features each head uses, bool of shape (F, H).
        learning_rates: Learning rate of each head for a batch size of 256. It is scaled with the
            batch size.
        link: Function that converts outputs to predictions.
        steps: Number of steps.
        batch_size: Number of rows per step.
        generator: Generator of the batches.
        weights: Weight of each row, of shape (N,). None: equal weights.
        description: Text of a progress bar. None: no progress bar.

    Returns:
        The heads. A head whose learning rate was too high may contain NaN.
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
    """Yield the rows of each step: shuffled epochs without incomplete batches."""
    drawn = 0
    while drawn < steps:
        order = torch.randperm(count, generator=generator)
        for rows in order[: count - count % batch_size].split(batch_size)[: steps - drawn]:
            drawn += 1
            yield rows
