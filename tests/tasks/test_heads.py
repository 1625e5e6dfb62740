"""DINOv2's heads: shapes, initialisation, output, and the first epoch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from scipy.special import erf
from torch import Tensor, nn

from geofm.tasks import DINOv2
from tests.pairs import RandomPairsDataModule
from tests.tasks.test_dinov2 import SMALL, small_task, small_trainer

PUBLISHED = {'head_hidden_dim', 'head_bottleneck_dim'}


@pytest.fixture(scope='module')
def task() -> DINOv2:
    """Build separate heads of the default widths with few prototypes."""
    args = {k: v for k, v in SMALL.items() if k not in PUBLISHED}
    return DINOv2(**{**args, 'separate_ibot_head': True, 'ibot_prototypes': 48})


def written_out(head: nn.Module, x: Tensor) -> np.ndarray:
    """Linear, GELU, linear, GELU, linear, onto the sphere, cosines with prototypes times gains."""
    weights = {name: value.detach().double().numpy() for name, value in head.named_parameters()}
    hidden = x.double().numpy()
    for layer in (0, 2, 4):
        hidden = hidden @ weights[f'layers.{layer}.weight'].T + weights[f'layers.{layer}.bias']
        if layer < 4:
            hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    hidden /= np.linalg.norm(hidden, axis=1, keepdims=True)
    directions = weights['last_layer.weight_v']
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return hidden @ (weights['last_layer.weight_g'] * directions).T


@pytest.mark.parametrize(('name', 'prototypes'), [('dino_head', 64), ('ibot_head', 48)])
def test_a_head_is_dinov2s(task: DINOv2, name: str, prototypes: int) -> None:
    head = task.student[name]
    assert {key: tuple(value.shape) for key, value in head.named_parameters()} == {
        'layers.0.weight': (2048, 32),
        'layers.0.bias': (2048,),
        'layers.2.weight': (2048, 2048),
        'layers.2.bias': (2048,),
        'layers.4.weight': (256, 2048),
        'layers.4.bias': (256,),
        'last_layer.weight_v': (prototypes, 256),
        'last_layer.weight_g': (prototypes, 1),
    }
    assert all(parameter.requires_grad for parameter in head.parameters())
    for layer in (0, 2, 4):
        weight = head.get_parameter(f'layers.{layer}.weight')
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert abs(weight.mean().item()) < 1e-3
        assert not head.get_parameter(f'layers.{layer}.bias').any()
    assert (head.get_parameter('last_layer.weight_g') == 1).all()
    teacher = task.teacher_heads[name]
    for key, value in head.state_dict().items():
        assert torch.equal(teacher.state_dict()[key], value), key

    x = torch.randn(6, 32)
    np.testing.assert_allclose(head(x).detach().numpy(), written_out(head, x), atol=1e-5)
    # With gains of 1 the logits are cosines; with others they are not.
    assert head(x).abs().max() <= 1
    with torch.no_grad():
        head.get_parameter('last_layer.weight_g').uniform_(0.5, 2)
        for layer in (0, 2, 4):
            head.get_parameter(f'layers.{layer}.bias').normal_()
    np.testing.assert_allclose(head(x).detach().numpy(), written_out(head, x), atol=1e-5)


def test_frozen_last_layer_has_gradients_and_moments_but_no_learning_rate(tmp_path: Path) -> None:
    """As in DINOv2: its gradient counts when norms are clipped, and AdamW keeps its averages."""
    task = small_task(freeze_last_layer_epochs=1, warmup_epochs=0, separate_ibot_head=True)
    heads = [task.student[name] for name in ('dino_head', 'ibot_head')]
    before = [
        {key: value.clone() for key, value in head.last_layer.named_parameters()}  # type: ignore[union-attr]
        for head in heads
    ]
    first = [head.get_parameter('layers.0.weight').clone() for head in heads]
    steps: list[bool] = []

    class Watch(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if not trainer.global_step:
                return
            for head in heads:
                last: Any = head.last_layer
                for parameter in last.parameters():
                    assert parameter.grad.abs().max() > 0
                    assert optimizer.state[parameter]['exp_avg_sq'].max() > 0

        def on_train_batch_end(self, *args: Any) -> None:
            for head, kept, weight in zip(heads, before, first, strict=True):
                assert not torch.equal(head.get_parameter('layers.0.weight'), weight)
                last: Any = head.last_layer
                same = {torch.equal(value, kept[k]) for k, value in last.named_parameters()}
                assert len(same) == 1
                steps.append(same.pop())

    trainer = small_trainer(tmp_path, max_epochs=2, callbacks=[Watch()], limit_val_batches=0)
    trainer.fit(task, datamodule=RandomPairsDataModule())
    assert steps == [True] * 8 + [False] * 8
