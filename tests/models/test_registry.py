"""Names of models: their sizes are the published ones."""

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from geofm.models import MODEL_NAMES, MultiSensorViT
from geofm.models.fusion import FUSIONS
from geofm.models.registry import PATCH_SIZES, SIZES, VARIANTS
from geofm.models.shapes import shapes_only
from geofm.sensors import SENSORS

#: Parameters in millions, of DINOv2's model card; ViT-Ti of DeiT's paper.
PUBLISHED = {'tiny': 5, 'small': 21, 'base': 86, 'large': 300, 'giant': 1100}

#: What our single-sensor models have beside timm's: a mask token, and the projection of the day
#: of the year's four harmonics.
EXTRAS = {'mask_token', 'day_of_year.proj.weight'}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    with shapes_only():
        return timm.create_model(name, num_classes=0, **kwargs)


def test_every_name_is_there() -> None:
    assert len(VARIANTS) == 2 + len(FUSIONS)
    assert len(MODEL_NAMES) == len(SIZES) * len(PATCH_SIZES) * len(VARIANTS) == 18 * len(VARIANTS)
    for name in MODEL_NAMES:
        assert timm.is_model(name)
        assert timm.get_pretrained_cfg(name).input_size[1:] == (224, 224)  # type: ignore[union-attr]


@pytest.mark.parametrize('size', ['small', 'base', 'large', 'giant'])
@pytest.mark.parametrize('channels', [2, 13])
def test_parameters_are_those_of_dinov2(size: str, channels: int) -> None:
    reference = on_meta(f'vit_{size}_patch14_reg4_dinov2', in_chans=channels, img_size=518)
    variant = {2: 's1', 13: 's2'}[channels]
    model = on_meta(f'geofm_vit_{size}_patch14_{variant}', in_chans=channels, img_size=518)
    own = dict(model.named_parameters())
    assert {n for n in own if not n.startswith('encoders.')} == EXTRAS
    extras = sum(own[name].numel() for name in EXTRAS)
    assert count(model) - extras == count(reference)
    shapes = {n.removeprefix(f'encoders.{variant}.'): p.shape for n, p in own.items()}
    for name, parameter in reference.named_parameters():
        assert shapes[name] == parameter.shape, name


@pytest.mark.parametrize('size', PUBLISHED)
@pytest.mark.parametrize('patch_size', PATCH_SIZES)
def test_sizes_are_the_published_ones(size: str, patch_size: int) -> None:
    """With the three channels that the published models have."""
    bands = ['B04', 'B03', 'B02']
    model = on_meta(f'geofm_vit_{size}_patch{patch_size}_s2', in_chans=3, bands=bands)
    assert isinstance(model, MultiSensorViT)
    assert model.patch_size == patch_size
    assert count(model) / 1e6 == pytest.approx(
        PUBLISHED[size], rel=0.15 if size == 'tiny' else 0.04
    )


@pytest.mark.parametrize('size', SIZES)
def test_two_sensors_are_two_vits_and_a_fusion(size: str) -> None:
    one = {
        key: on_meta(f'geofm_vit_{size}_patch16_{key}', in_chans=len(SENSORS[key].bands))
        for key in ('s1', 's2')
    }
    encoders = sum(count(model.get_submodule(f'encoders.{key}')) for key, model in one.items())
    width = SIZES[size]['embed_dim']
    # Weights and biases of Linear(2D, 4D), LayerNorm(4D) and Linear(4D, D).
    linear = 2 * width * 4 * width + 4 * width + 2 * 4 * width + 4 * width * width + width
    # Query, key, value and output; twice LayerNorm; Linear(D, 4D) and Linear(4D, D).
    xattn = 4 * (width**2 + width) + 2 * 2 * width + 2 * 4 * width**2 + 5 * width
    stand_in, mask_tokens, day_of_year = 2 * (1 + 4 + 1) * width, 2 * width, 8 * width
    for fusion, of_fusion in (('linear', linear), ('xattn', xattn)):
        model = on_meta(f'geofm_vit_{size}_patch16_{fusion}', in_chans=15)
        expected = encoders + of_fusion + stand_in + mask_tokens + day_of_year
        assert count(model) == expected


@pytest.mark.parametrize('size', PUBLISHED)
def test_early_fusion_is_one_vit(size: str) -> None:
    model = on_meta(f'geofm_vit_{size}_patch14_early', in_chans=15, img_size=518)
    name = f'vit_{size}_patch14_reg4_dinov2' if size != 'tiny' else 'vit_tiny_patch16_224'
    args = {'patch_size': 14, 'reg_tokens': 4, 'no_embed_class': True, 'init_values': 1.0}
    reference = on_meta(name, in_chans=15, img_size=518, **(args if size == 'tiny' else {}))
    shapes = {n: p.shape for n, p in reference.named_parameters()}
    own = {n: p.shape for n, p in model.named_parameters()}
    assert {n.removeprefix('encoders.vit.'): s for n, s in own.items() if n not in EXTRAS} == shapes


def test_the_feed_forward_layer_is_a_matter_of_the_name_or_of_an_argument() -> None:
    model = on_meta('geofm_vit_large_patch14_s2', in_chans=13, ffn_layer='swiglu')
    block = model.get_submodule('encoders.s2.blocks.0.mlp')
    # DINOv2's rule: two thirds of 4 x 1024, in multiples of 8.
    assert block.get_parameter('fc1.weight').shape == (2 * 2736, 1024)
    assert block.get_parameter('fc2.weight').shape == (1024, 2736)
    assert isinstance(block.get_submodule('act'), nn.SiLU)
    giant = on_meta('geofm_vit_giant_patch16_s2', in_chans=13)
    assert giant.get_parameter('encoders.s2.blocks.39.mlp.fc1.weight').shape == (8192, 1536)
    plain = on_meta('geofm_vit_tiny_patch14_s2', in_chans=13, mlp_ratio=2)
    assert plain.get_parameter('encoders.s2.blocks.0.mlp.fc1.weight').shape == (384, 192)
    with pytest.raises(ValueError, match="ffn_layer must be 'mlp' or 'swiglu', not 'swiglufused'"):
        on_meta('geofm_vit_tiny_patch14_s2', in_chans=13, ffn_layer='swiglufused')


def test_swiglu_is_what_its_paper_says() -> None:
    """Shazeer, 2020: (silu(x W) * (x V)) W2; the gate comes first, as in DINOv2."""
    model = timm.create_model(
        'geofm_vit_tiny_patch16_s2', in_chans=13, ffn_layer='swiglu', embed_dim=12, depth=1
    )
    encoder = model.get_submodule('encoders.s2')
    assert isinstance(encoder, VisionTransformer)
    mlp: Any = encoder.blocks[0].mlp
    x = torch.randn(5, 12)
    gate, value = mlp.fc1(x).chunk(2, dim=-1)
    torch.testing.assert_close(mlp(x), mlp.fc2(gate * gate.sigmoid() * value))
