"""All configurations of DINOv2 are parsed, built and trained, and match their references."""

from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch import nn

from geofm.cli import main
from geofm.datasets import write_sample_data
from geofm.models import shapes_only
from geofm.tasks import DINOv2
from tests.stand_ins import write_sen12mscr

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    path.stem: path
    for path in sorted((ROOT / 'configs' / 'pretrain').glob('*.yaml'))
    # Other methods are tested in tests/test_eurosat_rgb.py.
    if yaml.safe_load(path.read_text())['model']['class_path'] == 'geofm.tasks.DINOv2'
}

#: Configurations with RasterArchiveDataModule.
ARCHIVES = ('archive', 'archive_dem', 'images')

#: dinov2/configs/ssl_default_config.yaml of facebookresearch/dinov2.
DINOV2_DEFAULT: dict[str, Any] = {
    'dino_weight': 1.0,
    'prototypes': 65536,
    'head_bottleneck_dim': 256,
    'head_hidden_dim': 2048,
    'koleo_weight': 0.1,
    'ibot_weight': 1.0,
    'mask_probability': 0.5,
    'mask_ratio': (0.1, 0.5),
    'separate_ibot_head': False,
    'centering': 'ema',
    'drop_path_rate': 0.3,
    'momentum': (0.992, 1),
    'teacher_temperature': (0.04, 0.07),
    'warmup_teacher_temperature_epochs': 30,
    'weight_decay': (0.04, 0.4),
    'lr': 4e-3,
    'scale_lr': True,
    'warmup_epochs': 10,
    'min_lr': 1e-6,
    'clip_grad': 3.0,
    'freeze_last_layer_epochs': 1,
    'patch_embed_lr_mult': 0.2,
    'layer_decay': 0.9,
    'betas': (0.9, 0.999),
    'global_scale': (0.32, 1.0),
    'local_scale': (0.05, 0.32),
    'n_local': 8,
    'global_size': 224,
    'local_size': 96,
}

#: The same with the changes of dinov2/configs/train/vitl14.yaml and vitg14.yaml.
DINOV2_LONG: dict[str, Any] = {
    **DINOV2_DEFAULT,
    'prototypes': 131072,
    'head_bottleneck_dim': 384,
    'separate_ibot_head': True,
    'ibot_prototypes': 131072,
    'ibot_bottleneck_dim': 256,
    'centering': 'sinkhorn_knopp',
    'drop_path_rate': 0.4,
    'momentum': (0.994, 1),
    'weight_decay': (0.04, 0.2),
    'lr': 2e-4,
    'warmup_epochs': 80,
    'layer_decay': 1.0,
    'local_size': 98,
}

#: The same with the crops and masks of a fork of DINOv2 for two sensors.
MULTIMODAL: dict[str, Any] = {
    **DINOV2_DEFAULT,
    'global_size': 192,
    'local_size': 96,
    'mask_probability': 0.3,
    'mask_ratio': (0.1, 0.3),
}

#: Hyperparameters, epochs, images per device, the same model in timm, and number of registers.
REFERENCES: dict[str, tuple[dict[str, Any], int, int, str, int]] = {
    'vitl16_short': (DINOV2_DEFAULT, 100, 64, 'vit_large_patch16_224', 0),
    'vitl14': (DINOV2_LONG, 500, 32, 'vit_large_patch14_dinov2', 0),
    'vitg14': (DINOV2_LONG, 500, 12, 'vit_giant_patch14_dinov2', 0),
    'sen12mscrts_vitb16_linear': (MULTIMODAL, 100, 64, 'vit_base_patch16_224', 2),
    'sen12mscrts_vitb16_xattn': (MULTIMODAL, 100, 64, 'vit_base_patch16_224', 2),
    'satlas_vitl16': (
        {**DINOV2_DEFAULT, 'global_size': 368, 'local_size': 192},
        100,
        24,
        'vit_large_patch16_224',
        4,
    ),
}

#: Millions of parameters of the backbone, from the paper and for the fusion.
MILLIONS = {
    'vitl16_short': 304,
    'vitl14': 304,
    'vitg14': 1136,
    'satlas_vitl16': 304,
    'sen12mscrts_vitb16_linear': 2 * 86 + 7.1,
    'sen12mscrts_vitb16_xattn': 2 * 86 + 7.1,
}


@cache
def understood(name: str) -> dict[str, Any]:
    """Return a configuration with all defaults, as parsed by the command line."""
    with redirect_stdout(StringIO()) as out, pytest.raises(SystemExit, match='0'):
        main(['fit', f'--config={CONFIGS[name]}', '--print_config'])
    config: dict[str, Any] = yaml.safe_load(out.getvalue())
    return config


@cache
def task_on_meta(name: str) -> DINOv2:
    """Build the task of a configuration without weights; tests only read it."""
    with torch.device('meta'):
        return DINOv2(**understood(name)['model']['init_args'])


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize('name', CONFIGS)
def test_the_model_has_the_expected_size(name: str) -> None:
    task = task_on_meta(name)
    assert all(parameter.is_meta for parameter in task.parameters())
    if name in MILLIONS:
        assert count(task.model) / 1e6 == pytest.approx(MILLIONS[name], rel=0.02)
    hparams = understood(name)['model']['init_args']
    heads = {'dino_head': hparams['prototypes']}
    if hparams['separate_ibot_head']:
        heads['ibot_head'] = hparams['ibot_prototypes']
    assert {n: head.last_layer.out_features for n, head in task.teacher_heads.items()} == heads  # type: ignore[union-attr]


@pytest.mark.parametrize('name', REFERENCES)
def test_hyperparameters_are_those_of_the_reference(name: str) -> None:
    numbers, epochs, batch_size, _, registers = REFERENCES[name]
    config = understood(name)
    given = config['model']['init_args']
    for key, value in numbers.items():
        found = tuple(given[key]) if isinstance(value, tuple) else given[key]
        assert found == value, key
    assert config['trainer']['max_epochs'] == epochs
    assert config['data']['init_args']['batch_size'] == batch_size
    model = task_on_meta(name).model
    assert model.num_reg_tokens == registers
    gamma = timm.create_model(
        given['model'],
        in_chans=given['in_channels'],
        bands=given['bands'],
        **{**(given['model_args'] or {}), 'depth': 1, 'embed_dim': 32, 'num_heads': 2},
    ).get_parameter(f'encoders.{model.sensors[-1]}.blocks.0.ls1.gamma')
    assert (gamma == 1e-5).all()


@pytest.mark.parametrize('name', REFERENCES)
def test_the_vit_is_that_of_the_reference(name: str) -> None:
    """Width, depth, patches and feed-forward layers equal those of the ViT in timm."""
    given = understood(name)['model']['init_args']
    swiglu = (given['model_args'] or {}).get('ffn_layer') == 'swiglu'
    model = task_on_meta(name).model
    with shapes_only():
        reference = timm.create_model(REFERENCES[name][3], num_classes=0)
    for key in model.sensors:
        encoder = model.get_submodule(f'encoders.{key}')
        theirs = {n: p.shape for n, p in reference.named_parameters()}
        ours = {n: p.shape for n, p in encoder.named_parameters()}
        for parameter in ('blocks.0.attn.qkv.weight', 'norm.weight', 'patch_embed.proj.bias'):
            assert ours[parameter] == theirs[parameter]
        assert encoder.patch_embed.patch_size == reference.patch_embed.patch_size  # type: ignore[union-attr]
        assert len(encoder.blocks) == len(reference.blocks)  # type: ignore[arg-type]
        if not swiglu:
            assert ours['blocks.0.mlp.fc1.weight'] == theirs['blocks.0.mlp.fc1.weight']
            continue
        # vitl14.yaml trains with SwiGLU, unlike the ViT-L/14 that DINOv2 distilled.
        assert ours['blocks.0.mlp.fc1.weight'] == (2 * 2736, 1024)


# -- two steps of each --------------------------------------------------------------------------


def reduced(config: dict[str, Any]) -> dict[str, Any]:
    """Return arguments for a smaller model, smaller crops and smaller batches."""
    model, trainer, data = config['model']['init_args'], config['trainer'], config['data']
    patch = 14 if 'patch14' in model['model'] else 16
    small: dict[str, Any] = {'embed_dim': 24, 'depth': 2, 'num_heads': 2}
    model['model_args'] = {**(model['model_args'] or {}), **small}
    for key, least in (('global_size', 2), ('local_size', 1)):
        model[key] = patch * max(least, round(model[key] / patch / 4))
    model['n_local'] = min(2, model['n_local'])
    model['head_hidden_dim'] //= 64
    for key in ('prototypes', 'head_bottleneck_dim', 'ibot_prototypes', 'ibot_bottleneck_dim'):
        model[key] = model[key] and max(8, model[key] // 2048)
    trainer.update(max_steps=2, accelerator='cpu', enable_progress_bar=False, devices=1)
    trainer.update(limit_val_batches=1, log_every_n_steps=1, logger=False)
    for callback in trainer['callbacks']:
        if callback['class_path'].endswith('ModelCheckpoint'):
            callback['init_args'] = {'save_last': True, 'every_n_train_steps': 1}
    data['init_args'] |= {'batch_size': 2, 'num_workers': 0}
    return config


def use_tree(config: dict[str, Any], root: Path) -> None:
    """Write a small data set in the layout of a configuration, and return its arguments."""
    tree = root / 'tree'
    if config['data']['class_path'].endswith('SEN12MSCRDataModule'):
        write_sen12mscr(tree)
    else:
        write_sample_data(tree, patches_per_roi=1, time_steps=2, size=48)
    config['data']['init_args']['paths'] = str(tree)


def use_images(config: dict[str, Any], root: Path) -> None:
    """Replace the data of a configuration by generated images with the same bands and dates."""
    arguments = config['data']['init_args']
    bands = arguments['source_bands']
    key, names = next(iter(bands.items())) if isinstance(bands, dict) else ('image', bands)
    channels = len(names) * (arguments['n_dates'] or 1)
    arguments['datamodule'] = None
    arguments['train_dataset'] = {
        'class_path': 'tests.stand_ins.GeneratedImages',
        'init_args': {'channels': channels, 'key': key},
    }


# Configurations of archives are run by tests/test_archive_docs.py.
@pytest.mark.parametrize('name', [name for name in CONFIGS if name not in ARCHIVES])
def test_it_trains(name: str, tmp_path: Path) -> None:
    config = reduced(yaml.safe_load(yaml.safe_dump(understood(name))))
    named = config['data']['class_path'].endswith('NamedBandsDataModule')
    use: Callable[[dict[str, Any], Path], None] = use_images if named else use_tree
    use(config, tmp_path)
    config['trainer']['default_root_dir'] = str(tmp_path)
    config.pop('ckpt_path', None)
    (tmp_path / 'small.yaml').write_text(yaml.safe_dump(config))
    main(['fit', f'--config={tmp_path / "small.yaml"}'])
    (last,) = tmp_path.rglob('last.ckpt')
    content = torch.load(last, weights_only=True)
    assert content['global_step'] == 2
    for key, value in content['state_dict'].items():
        assert value.isfinite().all(), key
    for key in ('model', 'centering', 'separate_ibot_head', 'lr', 'layer_decay'):
        assert content['hyper_parameters'][key] == understood(name)['model']['init_args'][key]
    # Two thirds of 4 x 24, gate and value in one; or 4 x 24.
    hidden = 2 * 64 if name in ('vitl14', 'vitg14') else 96
    inner = [k for n, k in content['state_dict'].items() if n.endswith('blocks.1.mlp.fc1.weight')]
    assert {len(weight) for weight in inner} == {hidden}
