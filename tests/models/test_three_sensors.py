"""Models of three sensors: what each kind of fusion computes, and what is done without a sensor."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from geofm.models import MultiSensorViT, View
from geofm.models.dates import NO_DATE
from geofm.models.fusion import (
    FUSIONS,
    Fusion,
    FusionKind,
    LinearFusion,
    one_vit_per_sensor,
)
from geofm.sensors import SENSORS

SMALL: dict[str, Any] = {
    'img_size': 32,
    'patch_size': 8,
    'embed_dim': 24,
    'depth': 2,
    'num_heads': 3,
    'reg_tokens': 2,
    'init_values': 1.0,
    'nhead': 3,
    'nlayer': 2,
    'sensors': ['s1', 's2', 'dem'],
    'in_chans': 16,
}
CHANNELS = {'s1': slice(0, 2), 's2': slice(2, 15), 'dem': slice(15, 16)}

#: Presence of the three sensors with one or two missing.
SUBSETS = [
    list(subset) for subset in itertools.product([True, False], repeat=3) if 0 < sum(subset) < 3
]


def build(fusion: str, **kwargs: Any) -> MultiSensorViT:
    torch.manual_seed(0)
    model = MultiSensorViT(**{**SMALL, 'fusion': fusion, **kwargs}).eval()
    nn.init.normal_(model.mask_token)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 16, 32, 32)


def alone(model: MultiSensorViT, x: Tensor) -> list[Tensor]:
    """Tokens of each sensor's ViT on its own channels, by timm."""
    encoders: Any = model.encoders
    return [encoders[key].forward_features(x[:, CHANNELS[key]]) for key in model.sensors]


def test_linear_fusion_concatenates_the_tokens_of_all(x: Tensor) -> None:
    model = build('linear')
    assert isinstance(model.fusion, LinearFusion)
    first: Any = model.fusion.mlp[0]
    assert (first.in_features, first.out_features) == (3 * 24, 4 * 24)
    expected = model.fusion.mlp(torch.cat(alone(model, x), dim=-1))
    torch.testing.assert_close(model.forward_features(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('query', SMALL['sensors'])
def test_the_query_attends_to_the_tokens_of_all_others(query: str, x: Tensor) -> None:
    model = build('xattn', query=query)
    tokens = dict(zip(model.sensors, alone(model, x), strict=True))
    asking = tokens.pop(query)
    context = torch.cat(list(tokens.values()), dim=1)
    fusion: Any = model.fusion
    for _ in range(2):
        asking = fusion.blocks[0](asking, context)
    torch.testing.assert_close(model.forward_features(x), asking, atol=1e-5, rtol=1e-5)
    maps = model.cls_attention(x)
    assert set(maps) == {*model.sensors, *(f'fusion_{key}' for key in tokens)}
    assert maps[f'fusion_{next(iter(tokens))}'].shape == (2, 3, 4, 4)
    # What a map leaves goes to CLS and registers.
    others = [maps[f'fusion_{key}'].sum(dim=(-2, -1)) for key in tokens]
    assert (sum(others) < 1).all()  # type: ignore[union-attr]


@pytest.mark.parametrize('fusion', FUSIONS)
def test_every_sensor_counts(fusion: str, x: Tensor) -> None:
    model = build(fusion)
    tokens = model.forward_features(x)
    dates = torch.full((2, 3), NO_DATE)
    for i, channels in enumerate(CHANNELS.values()):
        changed = x.clone()
        changed[:, channels] += torch.randn_like(changed[:, channels])
        for old, new in zip(tokens, model.forward_features(changed), strict=True):
            assert not torch.allclose(old, new, atol=1e-3)
        dated = dates.clone()
        dated[:, i] = 17_500
        assert not torch.allclose(model.forward_features(x, dated), tokens, atol=1e-5)


@pytest.mark.parametrize('fusion', FUSIONS)
@pytest.mark.parametrize('present', SUBSETS)
def test_any_sensors_may_be_missing(fusion: str, present: list[bool], x: Tensor) -> None:
    """Their pixels have no influence, those of the others have; without their bands it is equal."""
    model = build(fusion)
    here = [key for key, there in zip(model.sensors, present, strict=True) if there]
    there = torch.tensor([present, [True] * 3])
    wild = x.clone()
    for key, channels in CHANNELS.items():
        if key not in here:
            wild[0, channels] = 7.0
    tokens = model.forward_features(x, present=there)
    torch.testing.assert_close(model.forward_features(wild, present=there), tokens)
    whole = model.forward_features(x)
    torch.testing.assert_close(tokens[1], whole[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tokens[0], whole[0], atol=1e-4)
    for key in here:
        changed = x.clone()
        changed[0, CHANNELS[key]] += torch.randn(1)
        assert not torch.allclose(model.forward_features(changed, present=there)[0], tokens[0])

    bands = [band for key in here for band in SENSORS[key].band_names]
    fewer = build(fusion, bands=bands, in_chans=len(bands))
    fewer.load_state_dict(model.state_dict())
    kept = [i for key in here for i in range(16)[CHANNELS[key]]]
    torch.testing.assert_close(
        fewer.forward_features(x[:, kept])[0], tokens[0], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize('fusion', FUSIONS)
@pytest.mark.parametrize('pattern', ['mixed', 'equal', 'none'])
def test_packed_crops_are_as_the_plain_ones(fusion: str, pattern: str) -> None:
    model = build(fusion).train()
    presence = {
        'mixed': torch.tensor([[True, False, True], [True] * 3, [False, False, True], [True] * 3]),
        'equal': torch.tensor([[True, False, True]]).expand(4, -1),
        'none': None,
    }[pattern]
    masks = torch.rand(4, 16) < 0.4 if fusion == 'early' else torch.rand(4, 3, 16) < 0.4
    dates = torch.randint(17_000, 18_000, (4, 3))
    wanted = torch.tensor([0, 5, 17, 40, 41, 63])
    views = [
        View(torch.randn(4, 16, 32, 32), dates, masks, presence, wanted),
        View(torch.randn(3, 16, 16, 16), present=None if presence is None else presence[:3]),
    ]
    packed = model.forward_views(views)
    losses = []
    for view, found in zip(views, packed, strict=True):
        tokens = model.forward_features(view.image, view.dates, view.masks, view.present)
        patches = tokens[:, model.num_prefix_tokens :].flatten(0, 1)
        expected = patches[:0] if view.patches is None else patches[view.patches]
        torch.testing.assert_close(found.cls, tokens[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.patches, expected, atol=1e-5, rtol=1e-5)
        losses.append((found.cls.square().sum(), tokens[:, 0].square().sum()))
        losses.append((found.patches.pow(3).sum(), expected.pow(3).sum()))
    ours, theirs = (torch.stack(parts).sum() for parts in zip(*losses, strict=True))
    parameters = dict(model.named_parameters())
    pairs = zip(
        torch.autograd.grad(ours, list(parameters.values()), allow_unused=True),
        torch.autograd.grad(theirs, list(parameters.values()), allow_unused=True),
        strict=True,
    )
    for name, (one, other) in zip(parameters, pairs, strict=True):
        zero = torch.zeros_like(parameters[name])
        one, other = (zero if grad is None else grad for grad in (one, other))
        scale = other.abs().max().clamp_min(1)
        torch.testing.assert_close(one / scale, other / scale, atol=1e-4, rtol=0, msg=name)
        if pattern == 'none' and 'stand_in' not in name:
            assert other.any(), f'{name} got no gradient'


@pytest.mark.parametrize('fusion', FUSIONS)
def test_other_sensors_by_model_args(fusion: str, x: Tensor) -> None:
    model = timm.create_model(
        f'geofm_vit_nano_patch8_{fusion}',
        sensors=['dem', 's1', 's2'],
        **{key: SMALL[key] for key in ('img_size', 'embed_dim', 'depth', 'num_heads', 'in_chans')},
        nhead=3,
    )
    assert isinstance(model, MultiSensorViT)
    assert model.sensors == ('s1', 's2', 'dem')
    assert model.bands[-1] == 'dem.elevation'
    assert model(x).shape == (2, 24)
    maps = timm.create_model(
        f'geofm_vit_nano_patch8_{fusion}',
        sensors=['dem', 's1', 's2'],
        in_chans=16,
        features_only=True,
        embed_dim=24,
        depth=2,
        out_indices=[1],
    )(x)
    assert maps[0].shape == (2, 24, 4, 4)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match='sensors must be some of'):
        build('linear', sensors=['s1', 's9'])
    with pytest.raises(ValueError, match='fusion must be one of'):
        build('middle')
    with pytest.raises(ValueError, match=r'dates of shape \(2, 2\) must have a column for each of'):
        build('joint').forward_features(torch.zeros(2, 16, 32, 32), torch.zeros(2, 2).long())


class MeanFusion(nn.Module):
    """A fifth kind: the mean of the tokens of all sensors."""

    needs_every_token = False

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tokens)).mean(dim=0)

    def attention(self, tokens: Sequence[Tensor]) -> dict[int, Tensor]:
        return {}

    def describe(self, sensors: Sequence[str]) -> str:
        return 'mean'


def test_another_kind_of_fusion_is_one_entry(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    kind = FusionKind(one_vit_per_sensor, lambda args: MeanFusion())
    monkeypatch.setitem(FUSIONS, 'mean', kind)
    model = build('mean')
    fusion: Fusion = MeanFusion()
    assert fusion.describe(model.sensors) == 'mean'
    expected = torch.stack(alone(model, x)).mean(dim=0)
    torch.testing.assert_close(model.forward_features(x), expected, atol=1e-5, rtol=1e-5)
    (found,) = model.forward_views([View(x, patches=torch.tensor([3]))])
    torch.testing.assert_close(found.patches[0], expected[0, 3 + 3], atol=1e-5, rtol=1e-5)
    assert set(model.cls_attention(x)) == set(model.sensors)
    missing = model.forward_features(x, present=torch.tensor([[True, False, True]] * 2))
    assert not torch.allclose(missing, expected)
