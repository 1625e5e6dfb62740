"""Joint fusion: one transformer over the tokens of all sensors, against a plain loop."""

from typing import Any

import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geofm.models import MultiSensorViT
from geofm.models.dates import NO_DATE
from geofm.models.segments import SensorPatchEmbed

SMALL: dict[str, Any] = {
    'img_size': 32,
    'patch_size': 8,
    'embed_dim': 24,
    'depth': 2,
    'num_heads': 3,
    'reg_tokens': 2,
    'init_values': 1.0,
    'fusion': 'joint',
    'sensors': ['s1', 's2', 'dem'],
    'in_chans': 16,
}
CHANNELS = {'s1': slice(0, 2), 's2': slice(2, 15), 'dem': slice(15, 16)}
PREFIX = 3


def build(**kwargs: Any) -> MultiSensorViT:
    model = MultiSensorViT(**{**SMALL, **kwargs}).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name in ('mask_token', 'sensor_embed'):
            nn.init.normal_(parameter, mean=1.0 if 'norm' in name else 0.0, std=0.3)
    return model


def plain_tokens(
    model: MultiSensorViT,
    x: Tensor,
    sensors: list[str],
    dates: Tensor | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """Tokens of one sample in which *sensors* are present: nothing but loops and timm's blocks."""
    vit = model.encoders['vit']
    assert isinstance(vit, VisionTransformer)
    embeds: Any = vit.patch_embed
    assert isinstance(embeds, SensorPatchEmbed)
    embeddings: Any = model.sensor_embed
    grid = [x.shape[-2] // 8, x.shape[-1] // 8]
    positions = resample_abs_pos_embed(vit.pos_embed, grid, [4, 4], num_prefix_tokens=0)[0]
    sequence = [vit.cls_token[0], vit.reg_token[0]]  # type: ignore[index]
    for sensor in sensors:
        index = model.sensors.index(sensor)
        kernel: Any = embeds[sensor].proj
        patches = nn.functional.conv2d(x[:, CHANNELS[sensor]], kernel.weight, kernel.bias, stride=8)
        for n, patch in enumerate(patches[0].flatten(1).T):
            hidden = masks is not None and bool((masks if masks.ndim == 1 else masks[index])[n])
            token = model.mask_token[0] if hidden else patch
            token = token + positions[n] + embeddings[index]
            if dates is not None:
                token = token + model.day_of_year(dates[None, index])[0]
            sequence.append(token[None])
    tokens = torch.cat(sequence)[None]
    for block in vit.blocks:
        tokens = block(tokens)
    tokens = vit.norm(tokens)
    count = grid[0] * grid[1]
    parts = tokens[:, PREFIX:].unflatten(1, (len(sensors), count))
    return torch.cat([tokens[:, :PREFIX], parts.mean(dim=1)], dim=1)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 16, 32, 24)


def test_tokens_are_those_of_a_plain_loop(x: Tensor) -> None:
    model = build()
    dates = torch.tensor([[17_500, 17_510, NO_DATE], [17_600, NO_DATE, NO_DATE]])
    masks = torch.rand(2, 3, 12) < 0.4
    tokens = model.forward_features(x, dates, masks)
    for i in range(2):
        expected = plain_tokens(model, x[i : i + 1], ['s1', 's2', 'dem'], dates[i], masks[i])
        torch.testing.assert_close(tokens[i : i + 1], expected, atol=1e-5, rtol=1e-5)
    tokens = model.forward_features(x, masks=masks[:, 0])
    expected = plain_tokens(model, x[:1], ['s1', 's2', 'dem'], masks=masks[0, 0])
    torch.testing.assert_close(tokens[:1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('here', [['s1'], ['dem'], ['s1', 'dem'], ['s1', 's2'], ['s2', 'dem']])
def test_a_missing_sensor_has_no_tokens(here: list[str], x: Tensor) -> None:
    """As without its tokens: not present, whatever its pixels, or not among the bands."""
    model = build()
    expected = plain_tokens(model, x[:1], here)
    present = torch.tensor([[key in here for key in model.sensors], [True, True, True]])
    wild = x.clone()
    for key, channels in CHANNELS.items():
        if key not in here:
            wild[0, channels] = torch.nan
    tokens = model.forward_features(wild, present=present)
    torch.testing.assert_close(tokens[:1], expected, atol=1e-5, rtol=1e-5)
    whole = model.forward_features(x)
    torch.testing.assert_close(tokens[1], whole[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tokens[0], whole[0], atol=1e-3)

    bands = [band for key in here for band in model.encoder_bands[key]]
    fewer = build(bands=bands, in_chans=len(bands))
    fewer.load_state_dict(model.state_dict())
    kept = [i for key in here for i in range(16)[CHANNELS[key]]]
    tokens = fewer.forward_features(x[:, kept])
    torch.testing.assert_close(tokens[:1], expected, atol=1e-5, rtol=1e-5)
    assert set(fewer.cls_attention(x[:, kept])) == set(here)


def test_without_any_sensor_patches_are_zero(x: Tensor) -> None:
    tokens = build().forward_features(x, present=torch.zeros(2, 3, dtype=torch.bool))
    assert tokens.isfinite().all()
    assert not tokens[:, PREFIX:].any()


def test_intermediate_tokens_and_attention(x: Tensor) -> None:
    model = build()
    final, features = model.forward_intermediates(x, [0, 1], output_fmt='NLC')
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(features[1], final[:, PREFIX:])
    assert features[0].shape == (2, 12, 24)

    present = torch.tensor([[True, False, True], [True, True, True]])
    seen = model.observe(x, present=present, block=0, query=torch.tensor([3, 7]), rollout=True)
    assert list(seen.attention) == list(seen.rollout) == ['s1', 's2', 'dem']
    assert seen.attention['dem'].shape == (2, 3, 4, 3)
    assert not seen.attention['s2'][0].any()
    assert not seen.rollout['s2'][0].any()
    assert seen.rollout['s2'][1].any()
    # By hand: the rows of the patch's token of each sensor, averaged over those present.
    vit = model.encoders['vit']
    assert isinstance(vit, VisionTransformer)
    attn: Any = vit.blocks[0].attn
    entered: list[Tensor] = []
    handle = attn.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    model.forward_features(x)
    handle.remove()
    q, k, _ = attn.qkv(entered[0]).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / 8**0.5).softmax(dim=-1)[1]
    rows = weights[:, [PREFIX + s * 12 + 7 for s in range(3)]].mean(dim=1)
    for i, key in enumerate(model.sensors):
        expected = rows[:, PREFIX + 12 * i : PREFIX + 12 * (i + 1)].unflatten(-1, (4, 3))
        torch.testing.assert_close(seen.attention[key][1], expected, atol=1e-5, rtol=1e-5)
    maps = model.cls_attention(x, present=present)
    assert (sum(part.sum(dim=(-2, -1)) for part in maps.values()) < 1).all()  # type: ignore[union-attr]
