"""Adapters and hooks in a backbone have the same effect on packed and on single crops."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from geofm.models import MultiSensorViT
from geofm.models.packed import is_plain
from geofm.tasks import DINOv2
from tests.models.test_packed import gradients, model, one_by_one, views
from tests.tasks.test_dinov2 import batch, small_task


class Lora(nn.Module):
    """Minimal LoRA layer that exposes the weights of the layer it wraps."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        wide = base.weight.flatten(1).shape[1]
        self.a = nn.Parameter(0.1 * torch.randn(3, wide))
        self.b = nn.Parameter(0.1 * torch.randn(len(base.weight), 3))

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        product = self.b @ self.a
        if isinstance(self.base_layer, nn.Linear):
            return self.base_layer(x) + nn.functional.linear(x, product)
        kernels = product.view_as(self.base_layer.weight)
        return self.base_layer(x) + nn.functional.conv2d(x, kernels, stride=kernels.shape[-1])


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Blend(nn.Module):
    """Branch whose output is blended with its mean over the tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.inner(x, *args, **kwargs)
        return out + out.mean(dim=1, keepdim=True)


class Halve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def blend(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Hook that needs whole sequences of shape (B, L, D)."""
    assert output.ndim == 3
    return output + output.mean(dim=1, keepdim=True)


def wrap(parent: Any, name: str, by: Callable[[Any], nn.Module]) -> None:
    setattr(parent, name, by(getattr(parent, name)))


def replace_forward(module: Any) -> None:
    """Replace ``forward`` of the instance, as accelerate does."""
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


ALTERATIONS: dict[str, Callable[[Any], object]] = {
    'adapter of queries, keys and values': lambda b: wrap(b.attn, 'qkv', Lora),
    'adapter of the projection': lambda b: wrap(b.attn, 'proj', Lora),
    'adapter of the MLP, in': lambda b: wrap(b.mlp, 'fc1', Lora),
    'adapter of the MLP, out': lambda b: wrap(b.mlp, 'fc2', Lora),
    'attention wrapped': lambda b: wrap(b, 'attn', Blend),
    'MLP wrapped': lambda b: wrap(b, 'mlp', Blend),
    'other stochastic depth': lambda b: setattr(b, 'drop_path1', Halve()),
    'hook of the block': lambda b: b.register_forward_hook(blend),
    'hook of attention': lambda b: b.attn.register_forward_hook(blend),
    'hook of a linear layer': lambda b: b.attn.qkv.register_forward_hook(blend),
    'hook of the MLP': lambda b: b.mlp.register_forward_hook(blend),
    'hook of a norm': lambda b: b.norm1.register_forward_hook(blend),
    'hook of layer scale': lambda b: b.ls1.register_forward_hook(blend),
    'hook before a layer': lambda b: b.mlp.fc2.register_forward_pre_hook(lambda _, x: (2 * x[0],)),
    'forward replaced': lambda b: replace_forward(b.mlp.fc1),
    'parametrised weight': lambda b: parametrize.register_parametrization(
        b.attn.proj, 'weight', Doubled()
    ),
}


@pytest.mark.parametrize('which', ['all', 'first', 'last'])
@pytest.mark.parametrize('alteration', ALTERATIONS)
def test_packed_crops_run_through_what_was_added(alteration: str, which: str) -> None:
    backbone = model().train()
    nn.init.normal_(backbone.mask_token)
    crops = views(backbone.in_chans)
    before = backbone.forward_views(crops)
    for key in backbone.encoders:
        blocks = list(backbone._encoder(key).blocks)
        assert all(is_plain(block) for block in blocks)
        for block in {'all': blocks, 'first': blocks[:1], 'last': blocks[-1:]}[which]:
            ALTERATIONS[alteration](block)
            assert not is_plain(block)
    packed, expected = backbone.forward_views(crops), one_by_one(backbone, crops)
    assert not torch.allclose(packed[0].cls, before[0].cls, atol=1e-4)
    for ours, theirs in zip(packed, expected, strict=True):
        torch.testing.assert_close(ours.cls, theirs.cls, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.patches, theirs.patches, atol=1e-5, rtol=1e-5)
    pairs = zip(gradients(backbone, packed), gradients(backbone, expected), strict=True)
    for ours_grad, theirs_grad in pairs:
        scale = theirs_grad.abs().max().clamp_min(1)
        torch.testing.assert_close(ours_grad / scale, theirs_grad / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    'add',
    [
        lambda embed: wrap(embed, 'proj', Lora),
        lambda embed: embed.register_forward_hook(lambda _, x, out: 2 * out),
        lambda embed: embed.proj.register_forward_hook(lambda _, x, out: 2 * out),
    ],
    ids=['adapter', 'hook', 'hook of the convolution'],
)
def test_patch_embedding_runs_through_what_was_added(add: Callable[[Any], object]) -> None:
    backbone = model()
    image = torch.randn(2, 15, 32, 32)
    embed: Any = backbone._encoder('s2').patch_embed
    plain, before = embed(image[:, 2:]), backbone(image)
    add(embed)
    assert not torch.allclose(embed(image[:, 2:]), plain)
    altered = backbone(image)
    assert not torch.allclose(altered, before, atol=1e-4)
    seen = []
    embed.register_forward_hook(lambda _, x, out: seen.append(out))
    torch.testing.assert_close(backbone(image), altered)
    assert len(seen) == 1


def adapt(backbone: MultiSensorViT) -> None:
    for key in backbone.encoders:
        for block in backbone._encoder(key).blocks:
            wrap(block.attn, 'qkv', Lora)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_adapters_learn_and_the_rest_can_be_frozen(checkpointing: bool) -> None:
    """Fine-tuning with adapters and stochastic depth."""
    task: DINOv2 = small_task(drop_path_rate=0.5, grad_checkpointing=checkpointing).train()
    backbone: Any = task.student['backbone']
    backbone.requires_grad_(False)
    for network in (backbone, task.model):
        torch.manual_seed(0)
        adapt(network)
    task.prepare_teacher()
    losses, _ = task.losses(batch(), 0.05)
    task.total(losses).backward()
    learning = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert all(name.endswith(('.a', '.b')) for name in learning)
    assert len(learning) == 2 * 2 * 2
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)
