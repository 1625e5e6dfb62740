"""DINO and iBOT losses: cross-entropy between the teacher's targets and the student."""

import torch
from torch import Tensor, nn

from geofm.losses.precision import at_least_float32


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
