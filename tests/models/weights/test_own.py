"""Checkpoints of this project in models of other bands, patches, positions or registers."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor

from geofm.models import CheckpointError, MultiSensorViT, load_backbone, load_backbone_weights
from geofm.sensors import BANDS, SENSORS
from geofm.tasks import DINOv2
from tests.models.weights.test_load import load
from tests.models.weights.vits import SMALL, randomise

NAME = 'geofm_vit_tiny_patch16_'
S2 = SENSORS['s2'].band_names
NO_B10 = [band for band in BANDS if band != 'B10']
EMBED = 'encoders.{}.patch_embed.proj.weight'


def build(variant: str = 'linear', bands: Any = BANDS, **args: Any) -> MultiSensorViT:
    args = {**SMALL, 'img_size': 64, 'reg_tokens': 2, **args}
    model = timm.create_model(NAME + variant, in_chans=len(bands), bands=list(bands), **args)
    assert isinstance(model, MultiSensorViT)
    randomise(model)
    return model.eval()


def save(folder: Path, variant: str = 'linear', bands: Any = BANDS, **args: Any) -> Path:
    args = {**SMALL, 'img_size': 64, 'reg_tokens': 2, **args}
    model = build(variant, bands, **args)
    content = {
        'hyper_parameters': {
            'model': NAME + variant,
            'in_channels': len(bands),
            'bands': list(bands),
            'model_args': args,
        },
        'state_dict': {f'model.{key}': value for key, value in model.state_dict().items()},
    }
    torch.save(content, folder / 'own.ckpt')
    return folder / 'own.ckpt'


def kept(model: MultiSensorViT, theirs: MultiSensorViT) -> set[str]:
    """Weights that are not the checkpoint's."""
    state = theirs.state_dict()
    return {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}


def columns(model: MultiSensorViT, key: str, bands: list[str]) -> Tensor:
    kernels = model.get_parameter(EMBED.format(key))
    return kernels[:, [model.encoder_bands[key].index(band) for band in bands]]


@pytest.mark.parametrize('variant', ['linear', 'xattn', 'early', 's2'])
def test_a_band_less(variant: str, tmp_path: Path) -> None:
    bands = [b for b in BANDS if variant != 's2' or b in S2]
    path = save(tmp_path, variant, bands)
    theirs = load_backbone(path)
    fewer = [band for band in bands if band != 'B10']
    model = build(variant, fewer)
    said = load(model, str(path))
    assert 'kernels of B10 not used' in said
    key = 'vit' if variant == 'early' else 's2'
    assert kept(model, theirs) <= {EMBED.format(key)}
    names = list(model.encoder_bands[key])
    assert torch.equal(columns(model, key, names), columns(theirs, key, names))
    # The band that is gone was at its mean, zero: both see the same.
    x = torch.randn(2, len(bands), 32, 32)
    x[:, bands.index('B10')] = 0
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(x[:, [bands.index(b) for b in fewer]]),
            theirs.forward_features(x),
            atol=1e-5,
            rtol=1e-4,
        )


def test_as_many_bands_but_others_are_told_apart_by_name(tmp_path: Path) -> None:
    """Shapes alone would fit: B09's kernel must not become B10's."""
    path = save(tmp_path, 'linear', [band for band in BANDS if band != 'B09'])
    theirs = load_backbone(path)
    model = build('linear', NO_B10)
    said = load(model, str(path))
    assert 'B09 start from the mean of the kernels' in said
    assert 'kernels of B10 not used' in said
    shared = [band for band in S2 if band not in ('B09', 'B10')]
    assert torch.equal(columns(model, 's2', shared), columns(theirs, 's2', shared))
    mean = theirs.get_parameter(EMBED.format('s2')).mean(dim=1)
    torch.testing.assert_close(columns(model, 's2', ['B09'])[:, 0], mean)


def test_patches_positions_and_registers(tmp_path: Path) -> None:
    path = save(tmp_path)
    theirs = load_backbone(path)
    model = build(img_size=(48, 32), patch_size=8, reg_tokens=4)
    said = load(model, str(path))
    for words in (
        'encoder of s1: patches resampled from 16 x 16 to 8 x 8 px',
        'encoder of s2: positions resampled from 4 x 4 to 6 x 4',
        'encoder of s2: registers not used: 2 instead of 4',
    ):
        assert words in said
    expected = resample_patch_embed(theirs.get_parameter(EMBED.format('s2')), [8, 8])
    assert torch.equal(model.get_parameter(EMBED.format('s2')), expected)
    assert torch.equal(model.stand_in[:, 0], theirs.stand_in[:, 0])
    assert torch.equal(model.stand_in[:, -1], theirs.stand_in[:, -1])
    assert torch.equal(model.mask_token, theirs.mask_token)
    name = 'fusion.mlp.0.weight'
    assert torch.equal(model.get_parameter(name), theirs.get_parameter(name))
    name = 'day_of_year.proj.weight'
    assert torch.equal(model.get_parameter(name), theirs.get_parameter(name))


def test_a_grid_that_is_not_square_is_not_taken_for_one(tmp_path: Path) -> None:
    """2 x 8 patches are 16, as 4 x 4 are."""
    path = save(tmp_path, img_size=(32, 128))
    theirs = load_backbone(path)
    for weights in (str(path), {'s1': str(path), 's2': str(path)}):
        model = build(img_size=(32, 128), bands=NO_B10)
        load(model, weights)
        name = 'encoders.s2.pos_embed'
        assert torch.equal(model.get_parameter(name), theirs.get_parameter(name))


def test_the_same_model_is_loaded_without_a_word(tmp_path: Path) -> None:
    path = save(tmp_path)
    model = build()
    assert load(model, str(path)) == ''
    assert kept(model, load_backbone(path)) == set()


def test_the_order_of_the_input_is_no_matter(tmp_path: Path) -> None:
    path = save(tmp_path)
    model = build(bands=BANDS[::-1])
    assert load(model, str(path)) == ''
    x = torch.randn(1, 15, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(x.flip(1)), load_backbone(path).forward_features(x)
        )


@pytest.mark.parametrize(
    ('variant', 'args', 'message'),
    [
        ('xattn', {}, 'fusion linear, but .* has xattn'),
        ('early', {}, r"encoders \['s1', 's2'\], but .* has \['vit'\]"),
        ('linear', {'num_heads': 4}, r'attention heads \[2, 2\], but .* has \[4, 4\]'),
        ('linear', {'depth': 4}, 'depth 3.*depth 4'),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    variant: str, args: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save(tmp_path, num_heads=2)
    model = build(variant, **{'num_heads': 2, **args})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf'own\.ckpt: .*{message}'):
        load_backbone_weights(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_cross_attention_of_another_number_of_layers_is_refused(tmp_path: Path) -> None:
    """Shared layers have the same weights, however many there are."""
    path = save(tmp_path, 'xattn', nlayer=2)
    with pytest.raises(CheckpointError, match=r'nlayer=2.*nlayer=3'):
        load_backbone_weights(build('xattn', nlayer=3), path)


def test_a_task_starts_from_other_bands(tmp_path: Path) -> None:
    path = save(tmp_path)
    args = {**SMALL, 'img_size': 64, 'reg_tokens': 2}
    heads: dict[str, Any] = {'prototypes': 16, 'head_hidden_dim': 8, 'head_bottleneck_dim': 4}
    with pytest.warns(UserWarning, match=r'own\.ckpt: fitted to the model: .*B10 not used'):
        task = DINOv2(
            NAME + 'linear', str(path), in_channels=14, bands=NO_B10, model_args=args, **heads
        )
    assert kept(task.model, load_backbone(path)) == {EMBED.format('s2')}


def test_one_sensor_s_encoder_is_fitted_by_name(tmp_path: Path) -> None:
    path = save(tmp_path)
    model = build('s2', [band for band in S2 if band != 'B10'], patch_size=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        load_backbone_weights(model, {'s2': str(path)})
    said = ' '.join(str(warning.message) for warning in caught)
    assert re.search(r'kernels of B10 not used.*not used: day_of_year, fusion, stand_in', said)
    expected = resample_patch_embed(columns(load_backbone(path), 's2', list(model.bands)), [8, 8])
    torch.testing.assert_close(model.get_parameter(EMBED.format('s2')), expected)
