from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from geofm.evaluation.backbones import (
    Backbone,
    BackboneConfig,
    StatisticsEncoder,
    ViTEncoder,
    band_statistics_encoder,
    build_backbone,
)
from geofm.evaluation.features import side_by_side
from geofm.models import CheckpointError, MultiSensorViT
from geofm.sensors import BANDS, RGB_BANDS, SENTINEL1, SENTINEL2, BandError, band_statistics
from tests.evaluation.labelled import TINY

NAME = 'geofm_vit_tiny_patch16_linear'
NO_B10 = tuple(band for band in BANDS if band != 'B10')


def images(bands: tuple[str, ...] = BANDS, size: int = 32) -> Tensor:
    mean, std = (s.view(-1, 1, 1) for s in band_statistics(bands))
    return mean + std * torch.randn(3, len(bands), size, size)


def features(backbone: Backbone, image: Tensor, **more: Any) -> Tensor:
    with torch.inference_mode():
        return backbone.encoder.pooled(backbone.adapter({'image': image, **more}))


def build(data: tuple[str, ...] = BANDS, random: bool = False, **config: Any) -> Backbone:
    return build_backbone(BackboneConfig(**config), data, {}, seed=0, random=random)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of a small model, as `geofm fit` writes it."""
    model = MultiSensorViT(**TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / 'last.ckpt'
    hparams = {'model': NAME, 'in_channels': 15, 'bands': list(BANDS), 'model_args': TINY}
    state = {f'model.{key}': value for key, value in model.state_dict().items()}
    torch.save({'state_dict': state, 'hyper_parameters': hparams}, path)
    return path


def test_a_checkpoint_gives_the_tokens_of_its_blocks(checkpoint: Path) -> None:
    from geofm.models import load_backbone

    backbone = build(model=str(checkpoint))
    assert (backbone.name, backbone.learned) == ('last', True)
    image, dates = images(), torch.tensor([[17_600, 17_603]] * 3)
    model = load_backbone(checkpoint)
    with torch.inference_mode():
        prepared = backbone.adapter({'image': image})['image']
        tokens = model.forward_features(prepared, dates)
        earlier = model.forward_intermediates(
            prepared, [0], True, output_fmt='NLC', intermediates_only=True, dates=dates
        )[0][1][:, 0]
    found = features(backbone, image, dates=dates)
    torch.testing.assert_close(found[:, 0], tokens[:, 0])
    torch.testing.assert_close(found[:, 1], tokens[:, model.num_prefix_tokens :].mean(1))
    torch.testing.assert_close(found[:, 2], earlier)
    std = tokens[:, model.num_prefix_tokens :].var(1, correction=0).sqrt()
    torch.testing.assert_close(found[:, backbone.encoder.features['std of patches'][0]], std)
    assert backbone.encoder.inputs['CLS of the last 2 blocks, mean of patches'] == (0, 1, 2)
    # Both have unit length, so that they have equal weight.
    both = side_by_side(found, backbone.encoder.features['CLS and mean of patches'])
    expected = [x / x.norm(dim=1, keepdim=True) for x in (found[:, 0], found[:, 1])]
    torch.testing.assert_close(both, torch.cat(expected, dim=1))
    assert torch.equal(side_by_side(found, (1,)), found[:, 1])


def test_weights_of_the_package_are_built_by_name() -> None:
    from geofm.models import load_backbone

    backbone = build(RGB_BANDS, model='eurosat-rgb-nano')
    assert (backbone.name, backbone.learned) == ('eurosat-rgb-nano', True)
    model, image = load_backbone('eurosat-rgb-nano'), images(RGB_BANDS, 64)
    with torch.inference_mode():
        tokens = model.forward_features(backbone.adapter({'image': image})['image'])
    torch.testing.assert_close(features(backbone, image)[:, 0], tokens[:, 0])


def test_a_checkpoint_of_a_torchgeo_task_gives_its_backbone(tmp_path: Path) -> None:
    """A checkpoint of `torchgeo.tasks.Classification` with a geofm model."""
    name = 'geofm_vit_tiny_patch16_s2'
    model: Any = timm.create_model(name, in_chans=13, num_classes=4)
    state = {f'model.{key}': value for key, value in model.state_dict().items()}
    hparams = {'model': name, 'weights': None, 'in_channels': 13, 'num_classes': 4}
    torch.save({'state_dict': state, 'hyper_parameters': hparams}, tmp_path / 'tuned.ckpt')
    backbone = build(model=str(tmp_path / 'tuned.ckpt'))
    assert backbone.learned
    assert backbone.model is not None
    for key, value in backbone.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    assert not build(random=True, model=str(tmp_path / 'tuned.ckpt')).learned


@pytest.mark.parametrize('here', [SENTINEL1, SENTINEL2])
def test_a_missing_sensor_is_replaced_by_its_tokens(checkpoint: Path, here: Any) -> None:
    from geofm.models import load_backbone

    backbone = build(here.band_names, model=str(checkpoint))
    absent = 's2' if here is SENTINEL1 else 's1'
    line = f"last: {absent} is not in the data: replaced by the model's missing-sensor tokens"
    assert backbone.lines == [line]
    image = images()
    chosen = image[:, [BANDS.index(band) for band in here.band_names]]
    whole = build(model=str(checkpoint)).adapter({'image': image})['image']
    present = torch.tensor([[key == here.name for key in ('s1', 's2')]] * 3)
    with torch.inference_mode():
        tokens = load_backbone(checkpoint).forward_features(whole, present=present)
    torch.testing.assert_close(features(backbone, chosen)[:, 0], tokens[:, 0])


@pytest.mark.parametrize('here', [SENTINEL1, SENTINEL2])
def test_a_missing_sensor_has_its_mean_in_early_fusion(here: Any, tmp_path: Path) -> None:
    from geofm.models import load_backbone

    def save(bands: list[str]) -> Path:
        model = MultiSensorViT(**TINY, bands=bands, in_chans=len(bands), fusion='early')
        name = 'geofm_vit_tiny_patch16_early'
        hparams = {'model': name, 'in_channels': len(bands), 'bands': bands, 'model_args': TINY}
        state = {f'model.{key}': value for key, value in model.state_dict().items()}
        path = tmp_path / f'{len(bands)}.ckpt'
        torch.save({'state_dict': state, 'hyper_parameters': hparams}, path)
        return path

    path = save(list(BANDS))
    backbone = build(here.band_names, model=str(path))
    assert backbone.lines[0].endswith('is not in the data: replaced by its mean')
    image = images()
    channels = [BANDS.index(band) for band in here.band_names]
    whole = build(model=str(path)).adapter({'image': image})['image']
    zeroed = torch.zeros_like(whole)
    zeroed[:, channels] = whole[:, channels]
    with torch.inference_mode():
        tokens = load_backbone(path).forward_features(zeroed)
    torch.testing.assert_close(features(backbone, image[:, channels])[:, 0], tokens[:, 0])
    # Built for one band of the missing sensor; a new model has all of its bands.
    few = save([*here.band_names, 'B02' if here is SENTINEL1 else 'VV'])
    with pytest.raises(CheckpointError, match='its weights do not fit'):
        build(here.band_names, model=str(few))


def test_a_single_missing_band_of_a_checkpoint_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(BandError, match='B10'):
        build(NO_B10, model=str(checkpoint))
    backbone = build(NO_B10, model=str(checkpoint), missing_bands='mean')
    assert backbone.adapter.bands == BANDS
    # A patch embedding of 0 equals a model without weights for the band.
    model: Any = backbone.model
    image = images(NO_B10)
    before = features(backbone, image)
    with torch.no_grad():
        model.encoders['s2'].patch_embed.proj.weight[:, SENTINEL2.band_names.index('B10')] = 7.0
    assert torch.equal(features(backbone, image), before)


def test_random_weights_are_made_for_the_bands_of_the_data() -> None:
    backbone = build(NO_B10, model=NAME, model_args=TINY)
    assert backbone.adapter.bands == NO_B10
    assert backbone.lines == [f"{NAME}: built without ['B10'], which the data lack"]
    assert not backbone.learned


def test_the_random_baseline_of_a_checkpoint_has_its_architecture(checkpoint: Path) -> None:
    learned = build(model=str(checkpoint))
    floor = build(random=True, model=str(checkpoint))
    assert floor.architecture == learned.architecture
    assert not floor.learned
    assert learned.model is not None
    assert floor.model is not None
    ours, theirs = learned.model.state_dict(), floor.model.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    name = 'encoders.s1.patch_embed.proj.weight'
    assert not torch.equal(ours[name], theirs[name])
    again = build(random=True, model=str(checkpoint)).model
    assert again is not None
    assert torch.equal(again.state_dict()[name], theirs[name])


def test_data_without_a_sensor_of_the_model_are_an_error() -> None:
    with pytest.raises(BandError, match=r"a model of \['s2'\]"):
        build(('VV', 'VH'), model='geofm_vit_tiny_patch16_s2', model_args=TINY)


def test_a_timm_model_normalises_images_by_its_own_statistics(tmp_path: Path) -> None:
    vit: Any = timm.create_model('vit_tiny_patch16_224', num_classes=3)
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    backbone = build(model='vit_tiny_patch16_224', weights=tmp_path / 'vit.pth')
    assert isinstance(backbone.encoder, ViTEncoder)
    assert backbone.learned
    image = images(size=64).clamp_min(0)
    rgb = image[:, [BANDS.index(band) for band in RGB_BANDS]]
    mean, std = (torch.tensor(vit.pretrained_cfg[k]).view(3, 1, 1) for k in ('mean', 'std'))
    expected = ((rgb / 3000).clamp(0, 1) - mean) / std
    torch.testing.assert_close(backbone.adapter({'image': image})['image'], expected)
    reference = timm.create_model('vit_tiny_patch16_224', num_classes=0, dynamic_img_size=True)
    reference.load_state_dict({k: v for k, v in vit.state_dict().items() if 'head' not in k})
    with torch.inference_mode():
        cls = reference.eval()(expected)
    torch.testing.assert_close(features(backbone, image)[:, 0], cls)


def test_a_convolutional_model_gives_pooled_features_and_its_last_map() -> None:
    backbone = build(model='resnet18', pretrained=False, bands=list(BANDS))
    assert not backbone.learned
    model: Any = backbone.model
    prepared = backbone.adapter({'image': images(size=64)})
    with torch.inference_mode():
        pooled = backbone.encoder.pooled(prepared)
        torch.testing.assert_close(pooled[:, 0], model(prepared['image']))
        patches = backbone.encoder.patches(prepared)
    assert patches.shape == (3, 512, 2, 2)
    torch.testing.assert_close(patches.mean(dim=(2, 3)), pooled[:, 0])


WEIGHTS = 'ViTSmall16_Weights.SENTINEL2_ALL_DINO'


def test_torchgeo_weights_have_their_own_bands_and_normalisation(tmp_path: Path) -> None:
    vit: Any = timm.create_model('vit_small_patch16_224', in_chans=13, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / 'dino.pth')
    backbone = build(model=WEIGHTS, weights=tmp_path / 'dino.pth', name='DINO')
    # In TorchGeo's order, B8a is between B8 and B9.
    assert backbone.adapter.bands == SENTINEL2.band_names
    assert backbone.learned
    image = images(size=224).clamp_min(1)
    prepared = backbone.adapter({'image': image})['image']
    torch.testing.assert_close(prepared, image[:, 2:] / 10_000)
    with torch.inference_mode():
        expected = vit.eval().forward_features(prepared)[:, 0]
    torch.testing.assert_close(features(backbone, image)[:, 0], expected)
    assert build(random=True, model=WEIGHTS).architecture == backbone.architecture


@pytest.mark.parametrize(
    ('config', 'error', 'match'),
    [
        ({'model': 'no_such_model'}, ValueError, 'is not a model'),
        ({'model': 'absent.ckpt'}, CheckpointError, 'no such file'),
        ({'model': 'ViTSmall16_Weights.NO_SUCH'}, ValueError, 'no weights'),
        ({'model': 'ViTSmall16_Weights.LANDSAT_TM_TOA_MOCO'}, BandError, 'not bands of Sentinel'),
        ({'model': 'ResNet50_Weights.SENTINEL2_RGB_SECO'}, BandError, '8-bit images'),
        ({'model': NAME, 'mean': {'B02': 1.0}}, BandError, 'mean and std must have the same bands'),
    ],
)
def test_errors_name_models_that_cannot_be_built(
    config: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        build(**config)


def test_errors_name_weights_that_do_not_fit(tmp_path: Path) -> None:
    torch.save({'a': torch.zeros(1)}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=r'other\.pth: its weights do not fit'):
        build(model='vit_tiny_patch16_224', weights=tmp_path / 'other.pth')
    (tmp_path / 'text.pth').write_text('no weights')
    with pytest.raises(CheckpointError, match=r'text\.pth: not a readable'):
        build(model='vit_tiny_patch16_224', weights=tmp_path / 'text.pth')


def test_random_convolutions_depend_only_on_the_seed() -> None:
    image = images()
    first = features(build(model='rcf'), image)
    assert torch.equal(features(build(model='rcf'), image), first)
    other = build_backbone(BackboneConfig('rcf'), BANDS, {}, seed=1)
    assert not torch.equal(features(other, image), first)
    assert not build(model='rcf').encoder.gives_patches


def test_statistics_use_only_valid_pixels() -> None:
    image = torch.randn(2, 3, 8, 8)
    valid = torch.rand(2, 8, 8) < 0.7
    image[0, :, ~valid[0]] = 1e6
    found = band_statistics_encoder({'image': image, 'valid': valid})
    for b in range(2):
        pixels = image[b][:, valid[b]]
        expected = torch.cat([pixels.mean(1), pixels.std(1, correction=0)])
        torch.testing.assert_close(found[b], expected, rtol=1e-4, atol=1e-5)


def test_statistics_of_cells_are_those_of_their_pixels() -> None:
    image = torch.randn(2, 3, 32, 48)
    cells = StatisticsEncoder().patches({'image': image})
    assert cells.shape == (2, 6, 2, 3)
    cell = image[1, :, 16:, 16:32].flatten(1)
    expected = torch.cat([cell.mean(1), cell.std(1, correction=0)])
    torch.testing.assert_close(cells[1, :, 1, 1], expected, rtol=1e-4, atol=1e-5)
