"""DINO and iBOT losses, and targets without collapse: centering, or Sinkhorn-Knopp."""

import torch
import torch.distributed as dist
from lightly.models.modules.center import Center, center_momentum
from torch import Tensor, nn

from geofm.losses.precision import at_least_float32
from geofm.losses.ranks import reduced


class DINOLoss(nn.Module):
    """Cross-entropy between views of an image, on the CLS token.

    Caron et al., 2021, and Oquab et al., 2023 (DINOv2): the mean over all pairs of a global crop
    seen by the teacher and a different crop seen by the student. Unlike lightly's loss of the same
    name it takes targets instead of teacher logits, so that it works with centering and with
    Sinkhorn-Knopp.

    Args:
        temperature: Student temperature.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of a batch.

        Args:
            logits: Student logits of shape (V, B, K). The first T views are the teacher's global
                crops, in the same order.
            targets: Teacher probabilities of shape (T, B, K).

        Returns:
            Mean over the T x (V - 1) pairs of different crops, and over the batch.
        """
        views, batch, _ = logits.shape
        log_probabilities = torch.log_softmax(at_least_float32(logits) / self.temperature, dim=-1)
        pairs = -torch.einsum('tbk,vbk->tv', targets, log_probabilities)
        total = pairs.sum() - pairs.diagonal().sum()
        return total / (len(targets) * (views - 1) * batch)


class IBOTLoss(nn.Module):
    """Cross-entropy between student and teacher on the student's masked patches.

    Zhou et al., 2022 (iBOT), as in DINOv2: the loss is averaged over the masked patches of each
    global crop, and the sum of these is divided by the number of all global crops, masked or not.
    Unlike lightly's ``IBOTPatchLoss`` it takes targets instead of teacher logits, so that it works
    with centering and with Sinkhorn-Knopp.

    Args:
        temperature: Student temperature.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor, targets: Tensor, masks: Tensor, masked: Tensor) -> Tensor:
        """Compute the loss of a batch.

        Args:
            logits: Student logits of the M masked patches, of shape (M, K).
            targets: Teacher probabilities of the same patches, of shape (M, K).
            masks: True where a patch is masked, bool of shape (2B, N) with M True.
            masked: Indices of the masked patches in the flattened masks, int64 of shape (M,).

        Returns:
            Scalar loss; 0 if nothing is masked.
        """
        log_probabilities = torch.log_softmax(at_least_float32(logits) / self.temperature, dim=-1)
        losses = -(targets * log_probabilities).sum(dim=-1)
        weights = 1 / masks.sum(dim=1).clamp_min(1)
        return (losses * weights[masked // masks.shape[1]]).sum() / len(masks)


class EMACentering(nn.Module):
    """Softmax of the teacher's logits after subtracting a moving average, the centre.

    Caron et al., 2021, *Emerging Properties in Self-Supervised Vision Transformers*. Each step uses
    the centre as it was before that step.

    Args:
        prototypes: Number K of prototypes.
        momentum: Momentum of the centre.
    """

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.prototypes = prototypes
        self.center = Center(size=(1, prototypes), momentum=momentum)

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Compute targets for the student.

        Args:
            logits: Teacher logits of shape (M, K).
            temperature: Teacher temperature.

        Returns:
            Probabilities in float32 or float64, of shape (M, K).
        """
        return torch.softmax((at_least_float32(logits) - self.center.value) / temperature, dim=-1)

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Move the centre towards the mean over the tokens of all ranks.

        Every token has the same weight, so the centre equals that of a single rank with the whole
        batch. DINOv2's code averages the means of the ranks, where a masked patch weighs more on a
        rank with few of them.

        Args:
            logits: Teacher logits of shape (M, K); M may differ between ranks. If M is 0 on all
                ranks, the centre does not change.
        """
        logits = at_least_float32(logits)
        count = logits.new_full((1,), float(len(logits)))
        # Reduce sums and count in one collective.
        sums, count = reduced(torch.cat([logits.sum(dim=0), count])).split([self.prototypes, 1])
        center = self.center.value
        moved = center_momentum(center, sums / count.clamp_min(1), self.center.momentum)
        self.center.center = torch.where(count > 0, moved, center)


class SinkhornKnopp(nn.Module):
    """Assignment of a batch to prototypes that uses every prototype equally often.

    Caron et al., 2020, *Unsupervised Learning of Visual Features by Contrasting Cluster
    Assignments*. DINOv2 uses it for both heads, over the tokens of all ranks.

    Args:
        prototypes: Number K of prototypes.
        iterations: Number of row and column normalisations.
    """

    def __init__(self, prototypes: int, iterations: int = 3) -> None:
        super().__init__()
        self.prototypes = prototypes
        self.iterations = iterations

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Compute targets for the student.

        Args:
            logits: Teacher logits of shape (M, K); M may differ between ranks.
            temperature: Teacher temperature.

        Returns:
            Probabilities in float32 or float64, of shape (M, K). Each row sums to 1, and the sum
            over the rows of all ranks is nearly equal for all prototypes.
        """
        scaled = at_least_float32(logits) / temperature
        # A constant offset cancels in the first normalisation; this one keeps exp finite.
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
            logits: Not used; accepted for the interface of :class:`EMACentering`.
        """
