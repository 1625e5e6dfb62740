"""From teacher logits to targets: centering, or Sinkhorn-Knopp, against collapse."""

import torch
import torch.distributed as dist
from lightly.models.modules.center import Center, center_momentum
from torch import Tensor, nn

from geofm.losses.precision import at_least_float32
from geofm.losses.ranks import reduced


class EMACentering(nn.Module):
    """Softmax of the teacher's logits, from which a moving average is taken off.

    Caron et al., 2021, *Emerging Properties in Self-Supervised Vision Transformers*. The centre
    of a step is that of the steps before it.

    Args:
        prototypes: Number K of prototypes.
        momentum: Momentum of the centre.
    """

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.prototypes = prototypes
        self.center = Center(size=(1, prototypes), momentum=momentum)

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Targets for the student.

        Args:
            logits: Teacher logits of shape (M, K).
            temperature: Teacher temperature.

        Returns:
            Probabilities in float32 or float64, of shape (M, K).
        """
        return torch.softmax((at_least_float32(logits) - self.center.value) / temperature, dim=-1)

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Move the centre towards the mean of a batch, over the tokens of all ranks.

        Each token counts alike, so that the centre is that of one rank with the whole batch.
        DINOv2's code takes the mean of the ranks' means, in which a masked patch counts more on a
        rank that has few of them.

        Args:
            logits: Teacher logits of shape (M, K); M may differ between ranks. If no rank has any,
                the centre stays.
        """
        logits = at_least_float32(logits)
        count = logits.new_full((1,), float(len(logits)))
        # One collective for both.
        sums, count = reduced(torch.cat([logits.sum(dim=0), count])).split([self.prototypes, 1])
        center = self.center.value
        moved = center_momentum(center, sums / count.clamp_min(1), self.center.momentum)
        self.center.center = torch.where(count > 0, moved, center)


class SinkhornKnopp(nn.Module):
    """Assignment of the batch to prototypes that uses every prototype equally.

    Caron et al., 2020, *Unsupervised Learning of Visual Features by Contrasting Cluster
    Assignments*; in DINOv2 for both heads, over the tokens of all ranks.

    Args:
        prototypes: Accepted for the same interface as :class:`EMACentering`.
        iterations: Number of row and column normalisations.
    """

    def __init__(self, prototypes: int, iterations: int = 3) -> None:
        super().__init__()
        self.prototypes = prototypes
        self.iterations = iterations

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Targets for the student.

        Args:
            logits: Teacher logits of shape (M, K); M may differ between ranks.
            temperature: Teacher temperature.

        Returns:
            Probabilities in float32 or float64, of shape (M, K): each row sums to 1, and the sum
            over the rows of all ranks is nearly the same for each prototype.
        """
        scaled = at_least_float32(logits) / temperature
        # One constant for all entries cancels in the first normalisation, and keeps exp finite.
        largest = scaled.max() if scaled.numel() else scaled.new_full((), -torch.inf)
        weights = torch.exp(scaled - reduced(largest, dist.ReduceOp.MAX))
        rows = reduced(scaled.new_full((), float(len(logits))))
        for _ in range(self.iterations):
            weights = weights / (reduced(weights.sum(dim=0)) * self.prototypes).clamp_min(1e-30)
            weights = weights / (weights.sum(dim=1, keepdim=True) * rows).clamp_min(1e-30)
        return weights * rows

    def update(self, logits: Tensor) -> None:
        """Do nothing: there is no state.

        Args:
            logits: Accepted for the same interface as :class:`EMACentering`.
        """
