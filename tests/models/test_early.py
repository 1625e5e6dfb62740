"""Early fusion: one ViT over the bands of all sensors, and zeros for one that is absent."""

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from geofm.models import MultiSensorViT
from geofm.models.dates import NO_DATE
from geofm.sensors import BANDS, SENSORS, BandError

SMALL: dict[str, Any] = {
    'embed_dim': 32,
    'depth': 2,
    'num_heads': 2,
    'patch_size': 8,
    'init_values': 1.0,
    'fusion': 'early',
}

#: Where the channels of each sensor are.
CHANNELS = {'s1': slice(0, 2), 's2': slice(2, 15)}


def build(**kwargs: Any) -> MultiSensorViT:
    return MultiSensorViT(**{**SMALL, **kwargs}).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 15, 32, 24)


def test_it_is_one_timm_vit_over_all_bands(x: Tensor) -> None:
    model = build()
    (vit,) = model.encoders.values()
    assert isinstance(vit, VisionTransformer)
    assert vit.patch_embed.proj.in_channels == 15
    assert model.fusion is None
    torch.testing.assert_close(model.forward_features(x), vit.forward_features(x))


def test_bands_are_matched_by_name(x: Tensor) -> None:
    model = build()
    order = torch.randperm(15).tolist()
    shuffled = build(bands=[BANDS[i] for i in order])
    shuffled.load_state_dict(model.state_dict())
    torch.testing.assert_close(shuffled(x[:, order]), model(x))
    few = build(bands=['B08', 'VV', 'B02'], in_chans=3)
    assert few.encoder_bands == {'vit': ('VV', 'B02', 'B08')}


@pytest.mark.parametrize('key', ['s1', 's2'])
def test_an_absent_sensor_is_its_mean(key: str, x: Tensor) -> None:
    """Not among the bands, or not present: the same as zeros, whatever its pixels and dates."""
    model = build()
    alone = build(in_chans=len(SENSORS[key].bands))
    alone.load_state_dict(model.state_dict())
    zeroed = torch.zeros_like(x)
    zeroed[:, CHANNELS[key]] = x[:, CHANNELS[key]]
    dates = torch.tensor([[17_500, 17_600]] * 2)
    here = torch.tensor([sensor == key for sensor in ('s1', 's2')])
    known = torch.where(here, dates, NO_DATE)
    expected = model.forward_features(zeroed, known)
    wild = torch.where(zeroed == 0, torch.nan, zeroed)
    for tokens in (
        alone.forward_features(x[:, CHANNELS[key]], dates),
        model.forward_features(wild, dates, present=here.expand(2, -1)),
    ):
        torch.testing.assert_close(tokens, expected)
    assert not torch.allclose(model.forward_features(x, dates), expected)
    assert list(alone.cls_attention(x[:, CHANNELS[key]])) == ['vit']


def test_presence_is_per_sample(x: Tensor) -> None:
    model = build()
    mixed = model.forward_features(x, present=torch.tensor([[True, True], [False, True]]))
    whole = model.forward_features(x)
    torch.testing.assert_close(mixed[0], whole[0])
    assert not torch.allclose(mixed[1], whole[1])


def test_a_hidden_patch_is_hidden_in_all_bands(x: Tensor) -> None:
    model = build()
    masks = torch.zeros(2, 12, dtype=torch.bool)
    masks[:, 4] = True  # row 1, column 1
    changed = x.clone()
    changed[..., 8:16, 8:16] += 3
    torch.testing.assert_close(
        model.forward_features(changed, masks=masks), model.forward_features(x, masks=masks)
    )
    with pytest.raises(ValueError, match=r'of shape \(B, N\), not \(2, 2, 12\)'):
        model.forward_features(x, masks=masks[:, None].expand(-1, 2, -1))


def test_each_sensors_date_counts(x: Tensor) -> None:
    model = build()
    plain = model(x)
    torch.testing.assert_close(model(x, torch.full((2, 2), NO_DATE)), plain)
    for dates in ([17_600, NO_DATE], [NO_DATE, 17_600]):
        assert not torch.allclose(model(x, torch.tensor([dates] * 2)), plain)


def test_what_timm_asks_of_a_model(x: Tensor) -> None:
    model = build(num_classes=3, drop_path_rate=0.1)
    assert model(x).shape == (2, 3)
    final, features = model.forward_intermediates(x, [0, 1], return_prefix_tokens=True)
    patches, prefix = features[-1]
    torch.testing.assert_close(torch.cat([prefix, patches.flatten(2).mT], dim=1), final)
    assert 'encoders.vit.pos_embed' in model.no_weight_decay()
    assert model.no_weight_decay() & set(dict(model.named_parameters()))
    with pytest.raises(BandError, match=r'the bands of the \d+ channels'):
        build(in_chans=10)


def test_with_one_sensor_there_is_nothing_to_fuse() -> None:
    assert list(build(sensors=('s2',), in_chans=13).encoders) == ['s2']
