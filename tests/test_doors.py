"""Checkpoints of all pretraining configurations in all interfaces, with their architecture.

Depth and width are reduced by the name (nano) and by ``depth``; bands, patch size, registers,
positions, feed-forward layers and fusion are those of the config.
"""

import functools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from segmentation_models_pytorch.encoders import get_encoder
from torch import Tensor, nn
from torchgeo.tasks import Classification, PixelwiseRegression, SemanticSegmentation
from torchgeo.tasks.utils import extract_backbone

from geofm.evaluation.backbones import BackboneConfig, build_backbone
from geofm.models import MultiSensorViT, export_torchgeo, load_backbone
from geofm.models.timm_vit import load_model
from geofm.sensors import band_statistics
from geofm.tasks import DINOv2, Mask2Former

CONFIGS = {
    path.stem: config['model']['init_args']
    for path in sorted(Path(__file__).resolve().parents[1].glob('configs/pretrain/*.yaml'))
    # Other methods are tested in tests/test_eurosat_rgb.py.
    if (config := yaml.safe_load(path.read_text()))['model']['class_path'] == 'geofm.tasks.DINOv2'
}
HEADS: dict[str, Any] = {'prototypes': 8, 'head_hidden_dim': 8, 'head_bottleneck_dim': 8}


def reduced(config: dict[str, Any]) -> dict[str, Any]:
    """Return the backbone arguments of a configuration with a smaller width and depth."""
    args = dict(config.get('model_args') or {})
    if 'giant' in config['model']:
        args['ffn_layer'] = 'swiglu'
    name = re.sub('_(tiny|small|base|large|giant)_', '_nano_', config['model'])
    names = ('in_channels', 'bands', 'global_size', 'local_size')
    kept: dict[str, Any] = {k: config[k] for k in names if k in config}
    return {'model': name, 'model_args': {**args, 'depth': 2}, **kept}


def architecture(config: dict[str, Any]) -> str:
    """Return what configurations of the same reduced architecture have in common."""
    # `in_channels` defaults to all bands.
    args = {'in_channels': 15, **reduced(config), 'global_size': None, 'local_size': None}
    return str(sorted({**args, 'model_args': sorted(args['model_args'].items())}.items()))


#: One configuration of each reduced architecture.
DISTINCT = {architecture(c): name for name, c in CONFIGS.items()}.values()


def write_checkpoint(path: Path, **kwargs: Any) -> Path:
    """A checkpoint of the task with random weights that differ from any initialisation."""
    task = DINOv2(**HEADS, **kwargs)
    for parameter in task.model.parameters():
        nn.init.normal_(parameter, std=0.05)
    torch.save({'hyper_parameters': dict(task.hparams), 'state_dict': task.state_dict()}, path)
    return path


@pytest.fixture(scope='module', params=DISTINCT)
def checkpoint(request: Any, module_path: Path) -> Iterator[Path]:
    torch.manual_seed(0)
    folder = module_path / request.param
    folder.mkdir()
    yield write_checkpoint(folder / 'last.ckpt', **reduced(CONFIGS[request.param]))
    shutil.rmtree(folder)


@pytest.fixture(scope='module')
def exported(checkpoint: Path) -> Path:
    return export_torchgeo(checkpoint, checkpoint.with_name('exported.ckpt'))


@functools.cache
def expected(path: Path) -> tuple[str, Tensor, MultiSensorViT, Tensor]:
    """Return the model name, an image, the backbone of the checkpoint and its tokens."""
    backbone = load_backbone(path)
    name = torch.load(path, weights_only=True)['hyper_parameters']['model']
    side = 2 * 7 * 16 if backbone.patch_size == 14 else 32
    image = torch.randn(1, backbone.in_chans, side, side)
    with torch.inference_mode():
        return name, image, backbone, backbone.forward_features(image)


def assert_same(model: Any, path: Path) -> None:
    """Check that the model computes the same as the backbone of the checkpoint."""
    _, image, backbone, tokens = expected(path)
    assert isinstance(model, MultiSensorViT)
    assert model.bands == backbone.bands
    with torch.inference_mode():
        torch.testing.assert_close(model.eval().forward_features(image), tokens)
    own = model.state_dict()
    for key, value in backbone.state_dict().items():
        assert torch.equal(own[key], value), key


def test_classification(checkpoint: Path, exported: Path) -> None:
    name, image, _, _ = expected(checkpoint)
    for weights in (checkpoint, exported):
        task = Classification(name, str(weights), image.shape[1], num_classes=3)
        assert_same(task.model, checkpoint)
        assert task.eval()(image).shape == (1, 3)
    # A fine-tuned task is loaded without the file of its initial weights.
    path = checkpoint.with_name('fine-tuned.ckpt')
    torch.save({'hyper_parameters': dict(task.hparams), 'state_dict': task.state_dict()}, path)
    again = Classification(**{**task.hparams, 'weights': None})
    again.load_state_dict(torch.load(path, weights_only=True)['state_dict'])
    assert_same(again.model, checkpoint)
    assert torch.equal(again.eval()(image), task.eval()(image))
    assert_same(load_model(path), checkpoint)


@pytest.mark.parametrize('decoder', ['unet', 'upernet', 'segformer'])
def test_segmentation_on_a_pyramid(decoder: Any, checkpoint: Path, exported: Path) -> None:
    name, image, _, _ = expected(checkpoint)
    weights = exported if decoder == 'unet' else checkpoint
    task = SemanticSegmentation(decoder, name, str(weights), image.shape[1], num_classes=3)
    assert_same(task.model.encoder.model, checkpoint)
    assert task.eval()(image).shape == (1, 3, *image.shape[2:])


def test_segmentation_by_dpt(checkpoint: Path, exported: Path) -> None:
    name, image, backbone, _ = expected(checkpoint)
    task = SemanticSegmentation('dpt', f'tu-{name}', str(exported), image.shape[1], num_classes=3)
    assert_same(task.model.encoder.model, checkpoint)
    with torch.inference_mode():
        maps, prefixes = task.model.encoder.eval()(image)
        wanted = backbone.forward_intermediates(
            image, [0, 0, 1, 1], intermediates_only=True, return_prefix_tokens=True
        )
    for features, prefix, (patches, tokens) in zip(maps, prefixes, wanted, strict=True):
        torch.testing.assert_close(features, patches)
        torch.testing.assert_close(prefix, tokens)


def test_pixel_regression(checkpoint: Path) -> None:
    name, image, _, _ = expected(checkpoint)
    task = PixelwiseRegression('upernet', name, str(checkpoint), image.shape[1])
    assert_same(task.model.encoder.model, checkpoint)


def test_mask2former(checkpoint: Path) -> None:
    name, image, _, _ = expected(checkpoint)
    small = {'encoder_layers': 1, 'decoder_layers': 2, 'encoder_feedforward_dim': 32}
    task = Mask2Former(
        name, str(checkpoint), image.shape[1], num_queries=2, model_args={**small, 'hidden_dim': 32}
    )
    assert_same(task.model.model.pixel_level_module.encoder.encoder.model, checkpoint)


def test_encoder_of_smp(checkpoint: Path) -> None:
    name, image, _, _ = expected(checkpoint)
    encoder: Any = get_encoder(name, in_channels=image.shape[1])
    encoder.load_state_dict(extract_backbone(str(checkpoint))[1])
    assert_same(encoder.model, checkpoint)
    # Also as a submodule, and with the pyramid.
    again: Any = get_encoder(name, in_channels=image.shape[1])
    task = nn.ModuleDict({'encoder': encoder})
    nn.ModuleDict({'encoder': again}).load_state_dict(task.state_dict())
    assert_same(again.model, checkpoint)
    for ours, theirs in zip(again(image)[1:], encoder(image)[1:], strict=True):
        assert torch.equal(ours, theirs)


def test_timm(checkpoint: Path, exported: Path) -> None:
    name, _, _, _ = expected(checkpoint)
    for weights in (checkpoint, exported):
        assert_same(timm.create_model(name, checkpoint_path=str(weights)), checkpoint)


def test_maps(checkpoint: Path, exported: Path) -> None:
    for path in (checkpoint, exported):
        assert_same(load_model(path), checkpoint)


def test_benchmark(checkpoint: Path) -> None:
    bands = expected(checkpoint)[2].bands
    mean, std = band_statistics(bands)
    numbers = zip(mean.tolist(), std.tolist(), strict=True)
    statistics = dict(zip(bands, numbers, strict=True))
    backbone = build_backbone(BackboneConfig(str(checkpoint)), bands, statistics, seed=0)
    assert_same(backbone.model, checkpoint)
