import math

import pytest
import torch
from lightly.loss import DINOLoss as LightlyDINOLoss
from lightly.loss import IBOTPatchLoss
from torch import Tensor

from geofm.losses import DINOLoss, IBOTLoss


def test_dino_loss_is_the_mean_over_pairs_of_different_crops() -> None:
    views, teachers, batch, prototypes, temperature = 10, 2, 3, 7, 0.1
    logits = torch.randn(views, batch, prototypes)
    targets = torch.randn(teachers, batch, prototypes).softmax(dim=-1)
    terms = []
    for t in range(teachers):
        for v in range(views):
            if t == v:
                continue
            for b in range(batch):
                scores = [math.exp(x / temperature) for x in logits[v, b].tolist()]
                logs = [math.log(s / sum(scores)) for s in scores]
                terms.append(-sum(p * q for p, q in zip(targets[t, b].tolist(), logs, strict=True)))
    assert len(terms) == 18 * batch
    loss = DINOLoss(temperature)(logits, targets)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_dino_loss_equals_lightlys() -> None:
    student, teacher = torch.randn(6, 4, 16), torch.randn(2, 4, 16)
    reference = LightlyDINOLoss(output_dim=16, student_temp=0.1)
    expected = reference(list(teacher), list(student), teacher_temp=0.05)
    loss = DINOLoss(0.1)(student, (teacher / 0.05).softmax(dim=-1))
    torch.testing.assert_close(loss, expected)


def places(masks: Tensor) -> Tensor:
    return masks.flatten().nonzero().squeeze(1)


def test_ibot_loss_weighs_each_image_alike_and_counts_those_without_masks() -> None:
    masks = torch.tensor([[True, True, True, False], [False] * 4, [False, True, False, False]])
    logits = torch.randn(4, 5)
    targets = torch.randn(4, 5).softmax(dim=-1)
    entropies = -(targets * (logits / 0.1).log_softmax(dim=-1)).sum(dim=-1)
    expected = (entropies[:3].mean() + entropies[3]) / 3
    torch.testing.assert_close(IBOTLoss(0.1)(logits, targets, masks, places(masks)), expected)


def test_ibot_loss_equals_lightlys() -> None:
    masks = torch.rand(6, 4, 4) < 0.4
    masks[2] = False
    masked = int(masks.sum())
    student, teacher = torch.randn(masked, 16), torch.randn(masked, 16)
    expected = IBOTPatchLoss(output_dim=16)(teacher, student, masks, teacher_temp=0.05)
    loss = IBOTLoss(0.1)(student, (teacher / 0.05).softmax(dim=-1), masks.flatten(1), places(masks))
    torch.testing.assert_close(loss, expected)


def test_ibot_loss_without_masks_is_zero_and_can_be_differentiated() -> None:
    logits, masks = torch.randn(0, 5, requires_grad=True), torch.zeros(2, 4, dtype=torch.bool)
    loss = IBOTLoss()(logits, torch.zeros(0, 5), masks, places(masks))
    loss.backward()
    assert loss.item() == 0
