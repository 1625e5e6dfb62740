"""A model that was built by its name takes its architecture from the weights, or refuses them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchgeo.tasks import Classification, SemanticSegmentation

from geofm.models import CheckpointError, MultiSensorViT, create_backbone, load_backbone
from geofm.models.architecture import KEY, Architecture
from geofm.sensors import BANDS, SENTINEL2, BandError

NAME = 'geofm_vit_nano_patch16_linear'
L2A = [band for band in BANDS if band != 'B10']
SHAPE: dict[str, Any] = {'depth': 1, 'embed_dim': 24, 'num_heads': 2, 'reg_tokens': 2}


def write(path: Path, name: str = NAME, bands: Any = None, **model_args: Any) -> Path:
    """A checkpoint of a small backbone, as the task writes one."""
    args = {**SHAPE, **model_args}
    channels = len(bands) if bands else len(BANDS)
    hparams = {'model': name, 'in_channels': channels, 'bands': bands, 'model_args': args}
    model = nn.ModuleDict({'model': create_backbone(hparams)})
    torch.save({'hyper_parameters': hparams, 'state_dict': model.state_dict()}, path)
    return path


def create(**kwargs: Any) -> MultiSensorViT:
    model: Any = timm.create_model(NAME, **kwargs)
    assert isinstance(model, MultiSensorViT)
    return model


def test_heads_that_change_no_shape_come_along(tmp_path: Path) -> None:
    """Nothing but the description tells how many heads there are, and how tokens are pooled."""
    path = write(tmp_path / 'last.ckpt', num_heads=6, global_pool='avg')
    model = Classification(NAME, str(path), 15, num_classes=3).model
    assert model.encoders['s1'].blocks[0].attn.num_heads == 6
    x = torch.randn(2, 15, 32, 32)
    features = model.eval().forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(features, load_backbone(path)(x))


def test_bands_come_along_all_or_of_one_sensor(tmp_path: Path) -> None:
    shuffled = [*L2A[::-1]]
    path = write(tmp_path / 'last.ckpt', bands=shuffled)
    for channels, bands in (
        (14, shuffled),
        (12, [band for band in shuffled if band in SENTINEL2.band_names]),
        (2, ['VH', 'VV']),
    ):
        model = Classification(NAME, str(path), channels, num_classes=3).model
        assert model.bands == tuple(bands)
        assert model(torch.randn(1, channels, 16, 16)).shape == (1, 3)
    with pytest.raises(BandError, match=r"take \['B01'.*was asked for \['B01'"):
        Classification(NAME, str(path), 13, num_classes=3)
    with pytest.raises(BandError, match='the bands of the 11 channels'):
        Classification(NAME, str(path), 11, num_classes=3)


def test_as_many_bands_that_are_others_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / 'last.ckpt', bands=['B08', 'B04', 'B03'])
    assert Classification(NAME, str(path), 3, num_classes=2).model.bands == ('B08', 'B04', 'B03')
    with pytest.raises(BandError, match=r"'B08'.*'B02'"):
        timm.create_model(NAME, in_chans=3, bands=['B04', 'B03', 'B02'], checkpoint_path=str(path))


def test_no_image_without_names_of_its_bands() -> None:
    model = create(in_chans=14)
    assert model.bands == ()
    with pytest.raises(BandError, match='the bands of the channels are unknown'):
        model(torch.randn(1, 14, 16, 16))


def test_what_the_caller_asked_for_is_not_overruled(tmp_path: Path) -> None:
    path = write(tmp_path / 'last.ckpt')
    with pytest.raises(CheckpointError, match=r"'reg_tokens': 4.*'reg_tokens': 2"):
        create(reg_tokens=4, checkpoint_path=str(path))
    assert create(reg_tokens=2, drop_rate=0.5, checkpoint_path=str(path)).head_drop.p == 0.5


@pytest.mark.parametrize('name', ['geofm_vit_tiny_patch16_linear', 'geofm_vit_nano_patch16_xattn'])
def test_weights_of_another_model_are_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / 'last.ckpt')
    with pytest.raises(CheckpointError, match=f"are of '{NAME}' and cannot be loaded"):
        Classification(name, str(path), 15, num_classes=3)


def test_weights_that_say_nothing_are_counted(tmp_path: Path) -> None:
    """A checkpoint without a description, of fewer blocks: none of the other half is random."""
    path = write(tmp_path / 'last.ckpt', embed_dim=192, num_heads=3, reg_tokens=4, depth=6)
    content = torch.load(path, weights_only=True)
    del content['state_dict'][f'model.{KEY}']
    torch.save(content, path)
    own = create().state_dict()
    model = Classification(NAME, str(path), 15, num_classes=3).model
    assert model.state_dict().keys() - {'head.weight', 'head.bias'} == own.keys()
    with pytest.raises(CheckpointError, match=r'of 361 weights 168 are missing, such as'):
        Classification('geofm_vit_tiny_patch16_linear', str(path), 15, num_classes=3)


def test_weights_that_are_missing_or_too_many_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / 'last.ckpt')
    content = torch.load(path, weights_only=True)
    state = content['state_dict']
    lacking = {key: value for key, value in state.items() if 'norm1' not in key}
    for broken, told in (
        (lacking, r'4 are missing, such as encoders\.s1\.blocks\.0\.norm1\.bias'),
        ({**state, 'model.decoder': torch.zeros(1)}, '1 are not used, such as decoder'),
    ):
        torch.save({**content, 'state_dict': broken}, tmp_path / 'broken.ckpt')
        with pytest.raises(CheckpointError, match=told):
            Classification(NAME, str(tmp_path / 'broken.ckpt'), 15, num_classes=3)


def test_dpt_refuses_what_its_decoder_was_not_built_for(tmp_path: Path) -> None:
    from geofm.models import export_torchgeo

    path = write(tmp_path / 'last.ckpt')
    with pytest.raises(RuntimeError, match='geofm export --to torchgeo') as error:
        SemanticSegmentation('dpt', f'tu-{NAME}', str(path), 15, num_classes=3)
    assert len(str(error.value)) < 300
    exported = export_torchgeo(path, tmp_path / 'exported.ckpt')
    with pytest.raises(CheckpointError, match=r"'embed_dim': 24.*use unet"):
        SemanticSegmentation('dpt', f'tu-{NAME}', str(exported), 15, num_classes=3)


def test_adapters_are_loaded_beside_a_backbone() -> None:
    """A part of the weights, given on purpose, is not taken for a backbone."""
    model = create(depth=1)
    found = model.load_state_dict({'mask_token': torch.ones(2, 192)}, strict=False)
    assert 'stand_in' in found.missing_keys
    assert (model.mask_token == 1).all()


def test_the_weights_of_the_model_alone_are_its_tensors() -> None:
    model = create(depth=1)
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert model.state_dict().keys() == names
    assert nn.ModuleDict({'model': model}).state_dict().keys() - {f'model.{n}' for n in names} == {
        f'model.{KEY}'
    }


def test_a_copy_and_an_optimiser_keep_their_parameters(tmp_path: Path) -> None:
    """Weights of the same architecture are copied into the tensors that are there."""
    path = write(tmp_path / 'last.ckpt')
    model = create(checkpoint_path=str(path))
    twin = copy.deepcopy(model)
    before = [*twin.parameters()]
    state = nn.ModuleDict({'model': model}).state_dict()
    twin.load_state_dict({k.removeprefix('model.'): v for k, v in state.items()})
    assert all(a is b for a, b in zip(before, twin.parameters(), strict=True))


@pytest.mark.parametrize(
    'text',
    [b'[', b'{}', b'{"model": 1, "bands": ["VV"], "model_args": {}}', b'\xff', b'[' * 100_000],
)
def test_a_damaged_description_is_refused(text: bytes) -> None:
    with pytest.raises(CheckpointError, match='description of their model'):
        Architecture.from_tensor(torch.tensor(list(text), dtype=torch.uint8))


def test_a_description_cannot_ask_for_anything_else(tmp_path: Path) -> None:
    """What may come out of a file are arguments of the model, none of timm's own."""
    path = write(tmp_path / 'last.ckpt')
    content = torch.load(path, weights_only=True)
    for args in ({'pretrained_cfg': {'url': 'http://127.0.0.1/x'}}, {'depth': 10**9}, {'depth': 2}):
        evil = Architecture(NAME, BANDS, args)
        content['state_dict'][f'model.{KEY}'] = evil.to_tensor()
        torch.save(content, path)
        with pytest.raises(CheckpointError):
            Classification(NAME, str(path), 15, num_classes=3)
