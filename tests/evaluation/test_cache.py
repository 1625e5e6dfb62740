from pathlib import Path

import pytest
import torch
from torch import nn

from geofm.evaluation.backbones import Adapter, StatisticsEncoder, ViTEncoder
from geofm.evaluation.data import LabelledData
from geofm.evaluation.features import FeatureCache, Features, feature_key
from geofm.models import MultiSensorViT
from geofm.sensors import BANDS
from tests.evaluation.labelled import TINY, noise_data


def features() -> Features:
    return Features(torch.randn(5, 2, 3), torch.arange(5))


def never() -> Features:
    raise AssertionError('computed again')


def test_features_are_computed_once_and_read_bit_for_bit(tmp_path: Path) -> None:
    lines: list[str] = []
    cache = FeatureCache(tmp_path / 'new', lines.append)
    made = features()
    assert cache.get('key', lambda: made) is made
    found = cache.get('key', never)
    assert torch.equal(found.values, made.values)
    assert torch.equal(found.targets, made.targets)
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['key.safetensors']
    assert not lines


@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'empty', 'text', 'foreign'])
def test_a_damaged_file_is_computed_again_with_a_note(damage: str, tmp_path: Path) -> None:
    lines: list[str] = []
    cache = FeatureCache(tmp_path, lines.append)
    cache.get('key', features)
    path = tmp_path / 'key.safetensors'
    content = bytearray(path.read_bytes())
    if damage == 'flipped':
        content[-3] ^= 1
    elif damage == 'foreign':
        from safetensors.torch import save

        content = bytearray(save({'x': torch.zeros(3)}))
    else:
        content = {'truncated': content[:-7], 'empty': bytearray(), 'text': bytearray(b'no')}[
            damage
        ]
    path.write_bytes(content)
    made = features()
    assert cache.get('key', lambda: made) is made
    assert lines == [f'{path}: damaged; its features are computed again']
    assert torch.equal(cache.get('key', never).values, made.values)


def test_without_a_folder_features_are_not_kept() -> None:
    cache = FeatureCache(None, lambda line: None)
    first, second = features(), features()
    assert cache.get('key', lambda: first) is first
    assert cache.get('key', lambda: second) is second


def key(data: LabelledData, model: nn.Module | None = None, adapter: Adapter | None = None) -> str:
    encoder = StatisticsEncoder() if model is None else ViTEncoder(model)
    return feature_key(encoder, adapter or Adapter(BANDS, BANDS), data, 'train', 'cpu')


def test_the_key_depends_on_everything_that_changes_features() -> None:
    data = noise_data()
    torch.manual_seed(0)
    model = MultiSensorViT(**TINY).eval()
    keys = [key(data), key(data, model)]
    with torch.no_grad():
        model.get_parameter('encoders.s2.patch_embed.proj.weight')[0, 0, 0, 0] += 1e-6
    keys.append(key(data, model))
    keys.append(key(data, adapter=Adapter(BANDS, BANDS, statistics={'B02': (1.0, 2.0)})))
    keys.append(key(data, adapter=Adapter(BANDS, BANDS, image_size=64)))
    keys.append(key(data, adapter=Adapter(BANDS, BANDS[::-1])))
    keys.append(key(noise_data(length=25)))
    keys.append(key(noise_data('multilabel')))
    changed = noise_data()
    changed.splits['train'].noise.images[0] += 1  # type: ignore[attr-defined]
    keys.append(key(changed))
    keys.append(feature_key(StatisticsEncoder(), Adapter(BANDS, BANDS), data, 'val', 'cpu'))
    assert len(set(keys)) == len(keys)
    assert key(noise_data()) == keys[0]
