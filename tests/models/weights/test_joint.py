"""Weights of others in models with joint fusion, and their ViTs in plain ones of timm."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from geofm.models import (
    CheckpointError,
    MultiSensorViT,
    export_backbone,
    load_backbone,
    load_backbone_weights,
)
from geofm.sensors import SENSORS
from tests.models.weights.test_load import load, save, small_timm
from tests.models.weights.vits import SMALL, randomise

ARGS = {**SMALL, 'img_size': 64, 'reg_tokens': 2, 'init_values': 1.0}
THREE = ['s1', 's2', 'dem']


def joint(sensors: list[str] = THREE, **kwargs: Any) -> MultiSensorViT:
    channels = sum(len(SENSORS[key].bands) for key in sensors)
    args: dict[str, Any] = {'in_chans': channels, **ARGS, 'sensors': sensors, **kwargs}
    model = timm.create_model('geofm_vit_tiny_patch16_joint', **args).eval()
    assert isinstance(model, MultiSensorViT)
    randomise(model)
    return model


def checkpoint(model: MultiSensorViT, path: Path) -> Path:
    args = {**ARGS, 'sensors': list(model.sensors)}
    hparams = {
        'model': 'geofm_vit_tiny_patch16_joint',
        'in_channels': model.in_chans,
        'bands': list(model.bands),
        'model_args': args,
    }
    state = {f'model.{key}': value for key, value in model.state_dict().items()}
    torch.save({'hyper_parameters': hparams, 'state_dict': state}, path)
    return path


@pytest.mark.parametrize('sensor', THREE)
def test_export_of_one_sensor_is_the_model_with_that_sensor_alone(
    sensor: str, tmp_path: Path
) -> None:
    model = joint()
    path = checkpoint(model, tmp_path / 'joint.ckpt')
    output, left_out = export_backbone(path, tmp_path / 'vit.safetensors', 'timm', sensor)
    others = [f'encoders.vit.patch_embed.{key}' for key in THREE if key != sensor]
    assert left_out == (*others, 'day_of_year', 'mask_token')
    bands = SENSORS[sensor].band_names
    vit = VisionTransformer(
        num_classes=0, in_chans=len(bands), no_embed_class=True, dynamic_img_size=True, **ARGS
    ).eval()
    vit.load_state_dict(load_file(output))
    x = torch.randn(2, 16, 64, 48)
    channels = [model.bands.index(band) for band in bands]
    present = torch.tensor([key == sensor for key in THREE]).expand(2, -1)
    torch.testing.assert_close(
        vit.forward_features(x[:, channels]),
        model.forward_features(x, present=present),
        atol=1e-5,
        rtol=1e-5,
    )
    with pytest.raises(ValueError, match='with --sensor, one of'):
        export_backbone(path, tmp_path / 'vit.pth', 'timm')
    # And out of the checkpoint itself, into the ViT of one sensor.
    single = timm.create_model(
        'geofm_vit_tiny_patch16_s2', sensors=[sensor], in_chans=len(bands), **ARGS
    )
    assert isinstance(single, MultiSensorViT)
    load(single, {sensor: str(path)})
    torch.testing.assert_close(
        single.eval().forward_features(x[:, channels]), vit.forward_features(x[:, channels])
    )


def test_a_vit_of_another_becomes_the_trunk(tmp_path: Path) -> None:
    model = joint()
    theirs = small_timm(in_chans=3, init_values=1.0)
    said = load(model, {'vit': save(theirs.state_dict(), tmp_path / 'vit.pth')})
    assert 'dem.elevation start from the mean' in said
    state, own = theirs.state_dict(), model.get_submodule('encoders.vit').state_dict()
    for name, value in state.items():
        if name.startswith(('blocks.', 'norm.')):
            assert torch.equal(own[name], value), name
    kernels = state['patch_embed.proj.weight']
    names = list(SENSORS['s2'].band_names)
    for i, band in enumerate(['B04', 'B03', 'B02']):
        of_s2 = own['patch_embed.s2.proj.weight'][:, names.index(band)]
        assert torch.equal(of_s2, kernels[:, i])
    assert torch.equal(own['patch_embed.dem.proj.weight'][:, 0], kernels.mean(dim=1))
    for key in THREE:
        assert torch.equal(own[f'patch_embed.{key}.proj.bias'], state['patch_embed.proj.bias'])


def test_a_file_for_a_sensor_is_its_patch_embedding(tmp_path: Path) -> None:
    model = joint()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    theirs = small_timm(in_chans=1, init_values=1.0)
    said = load(model, {'dem': save(theirs.state_dict(), tmp_path / 'dem.pth')})
    assert 'its channels are assumed to be dem.elevation' in said
    assert 'only the patch embedding is used' in said
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    prefix = 'encoders.vit.patch_embed.dem.proj.'
    assert changed == {f'{prefix}weight', f'{prefix}bias'}
    assert torch.equal(
        model.get_parameter(f'{prefix}weight'), theirs.state_dict()['patch_embed.proj.weight']
    )
    with pytest.raises(ValueError, match=r"weights for \['s9'\]"):
        load_backbone_weights(model, {'s9': 'x'})


def test_by_key_for_each_of_three_encoders(tmp_path: Path) -> None:
    model = timm.create_model(
        'geofm_vit_tiny_patch16_linear', sensors=THREE, in_chans=16, **ARGS
    ).eval()
    assert isinstance(model, MultiSensorViT)
    files = {}
    for key, channels in (('s1', 2), ('dem', 1)):
        files[key] = small_timm(in_chans=channels, init_values=1.0)
    said = load(
        model,
        {k: save(vit.state_dict(), tmp_path / f'{k}.pth') for k, vit in files.items()},
    )
    assert 'no weights were given for the encoder of s2 and the fusion' in said
    for key, vit in files.items():
        own = model.get_submodule(f'encoders.{key}').state_dict()
        assert torch.equal(
            own['blocks.0.attn.qkv.weight'], vit.state_dict()['blocks.0.attn.qkv.weight']
        )
        assert torch.equal(
            own['patch_embed.proj.weight'], vit.state_dict()['patch_embed.proj.weight']
        )


def test_a_checkpoint_fits_a_model_of_fewer_bands_and_other_registers(tmp_path: Path) -> None:
    source = joint()
    path = checkpoint(source, tmp_path / 'joint.ckpt')
    bands = [band for band in source.bands if band != 'B10']
    model = joint(bands=bands, in_chans=15, img_size=32)
    said = load(model, str(path))
    assert 'kernels of B10 not used' in said
    assert 'not in the source' not in said
    x = torch.randn(1, 16, 32, 32)
    x[:, source.bands.index('B10')] = 0
    kept = [source.bands.index(band) for band in bands]
    a, b = model.state_dict(), load_backbone(path).state_dict()
    for name, value in a.items():
        if 'pos_embed' not in name and 'patch_embed.s2.proj.weight' not in name:
            assert torch.equal(value, b[name]), name
    same = joint(bands=bands, in_chans=15)
    load(same, str(path))
    torch.testing.assert_close(
        same.forward_features(x[:, kept]), source.forward_features(x), atol=1e-5, rtol=1e-5
    )
    other = timm.create_model('geofm_vit_tiny_patch16_early', sensors=THREE, in_chans=16, **ARGS)
    with pytest.raises(CheckpointError, match='its model has encoders'):
        load_backbone_weights(other, path)  # type: ignore[arg-type]


def test_built_by_name_with_a_sensor_less(tmp_path: Path) -> None:
    """Weights of three sensors in a model of that name for the bands of two."""
    source = joint()
    state = source.state_dict()
    bands = [band for band in source.bands if band != 'dem.elevation']
    model = joint(bands=bands, in_chans=15)
    model.load_state_dict(state)
    x = torch.randn(1, 16, 32, 32)
    present = torch.tensor([[True, True, False]])
    torch.testing.assert_close(
        model.forward_features(x[:, :15]), source.forward_features(x, present=present)
    )
