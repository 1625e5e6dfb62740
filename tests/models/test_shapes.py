"""Models without weights have the shapes of models with weights."""

from typing import Any

import timm
import torch

from geofm.models import create_backbone
from geofm.models.shapes import shapes_only
from geofm.tasks import DINOv2

HPARAMS: dict[str, Any] = {
    'model': 'geofm_vit_nano_patch16_xattn',
    'in_channels': 15,
    'bands': None,
    'model_args': {'embed_dim': 24, 'depth': 1, 'num_heads': 2},
}


def test_only_values_are_missing() -> None:
    model = create_backbone(HPARAMS)
    state = torch.get_rng_state()
    with shapes_only():
        shapes = create_backbone(HPARAMS)
    assert torch.equal(torch.get_rng_state(), state)
    assert shapes.state_dict().keys() == model.state_dict().keys()
    pairs = zip(shapes.named_parameters(), model.named_parameters(), strict=True)
    for (name, theirs), (other, ours) in pairs:
        assert name == other
        assert theirs.is_meta
        assert theirs.shape == ours.shape
        assert theirs.dtype == ours.dtype
        assert theirs.stride() == ours.stride()
        assert theirs.requires_grad == ours.requires_grad
    for buffer, same in zip(shapes.buffers(), model.buffers(), strict=True):
        assert buffer.is_meta
        assert (buffer.shape, buffer.dtype) == (same.shape, same.dtype)


def test_tensors_with_values_are_filled() -> None:
    with shapes_only():
        weight = torch.empty(3, device='cpu')
        torch.nn.init.trunc_normal_(weight, mean=5.0, std=0.1, a=4.0, b=6.0)
        moved = weight - 4
        moved.mul_(2).add_(1)
    assert ((weight > 4) & (weight < 6)).all()
    torch.testing.assert_close(moved, 2 * weight - 7)


def test_results_of_models_without_weights_have_shapes() -> None:
    with shapes_only():
        model = timm.create_model('vit_tiny_patch16_224', depth=1)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
        # With gradients, too: only what fills weights is skipped.
        factor = torch.nn.Parameter(torch.ones(3))
        assert torch.zeros(2, 3).mul_(factor).requires_grad


def test_a_task_on_the_meta_device_has_no_values() -> None:
    heads: Any = {'prototypes': 8, 'head_hidden_dim': 8, 'head_bottleneck_dim': 8}
    with torch.device('meta'):
        task = DINOv2(**HPARAMS, **heads)
    assert all(parameter.is_meta for parameter in task.parameters())
