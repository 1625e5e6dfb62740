"""The backbone of `experiments/floods.py`: MAE of each sensor, then DINOv2 of both.

It sees the training places alone, without their masks: each after the flood and, where there is
one, before it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from flood_data import BANDS, Floods
from runs import latest_checkpoint

from geofm.cli import main as geofm

#: Small: there are 459 images to learn from, and one core.
SHAPE = {'embed_dim': 128, 'depth': 4, 'num_heads': 4}
PATCH = 8
NAME = f'geofm_vit_nano_patch{PATCH}_linear'

#: Side of the images of MAE in pixels.
MAE_SIDE = 64

#: Epochs of MAE, of 4,131 windows, and steps of DINOv2, of 32 windows.
MAE_EPOCHS = 10
DINO_STEPS = 120


def pretrain(floods: Floods, output: Path) -> Path:
    """Pretrain, unless it has been done.

    Args:
        floods: The places.
        output: Folder of the runs.

    Returns:
        Checkpoint of the fused backbone.
    """
    weights = {
        sensor: str(_fit(floods, output / f'mae_{sensor}', mae(floods, sensor, output)))
        for sensor in BANDS
    }
    return _fit(floods, output / 'dinov2', dinov2(floods, weights))


def mae(floods: Floods, sensor: str, output: Path) -> dict[str, Any]:
    """Configuration of TorchGeo's MAE of one sensor."""
    folder = output / 'mae_vit'
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        'architecture': 'vit_tiny_patch16_224',
        'model_args': {
            'img_size': MAE_SIDE,
            'patch_size': PATCH,
            'init_values': 1.0,
            **SHAPE,
        },
        'pretrained_cfg': {},
    }
    (folder / 'config.json').write_text(json.dumps(description))
    model = {
        'model': f'local-dir:{folder}',
        'in_channels': len(BANDS[sensor]),
        'size': MAE_SIDE,
        'decoder_dim': 128,
        'decoder_num_heads': 4,
        'decoder_depth': 1,
        'lr': 1e-3,
        'warmup_epochs': 1,
        # How bright a patch is tells water from land.
        'norm_pix_loss': False,
    }
    # Cropped to 0.2 to 1 of their area, and resized: at their true size on average.
    data = _data(floods, [sensor], window_size=96, batch_size=128)
    return _configuration('torchgeo.tasks.MAE', model, data, MAE_EPOCHS)


def dinov2(floods: Floods, weights: dict[str, str]) -> dict[str, Any]:
    """Configuration of DINOv2 of both sensors, from the encoders of MAE."""
    model = {
        'model': NAME,
        'weights': weights,
        'in_channels': sum(map(len, BANDS.values())),
        'bands': [band for bands in BANDS.values() for band in bands],
        'model_args': {
            'sensors': list(BANDS),
            'img_size': MAE_SIDE,
            'init_values': 1.0,
            'reg_tokens': 0,
            **SHAPE,
        },
        'drop_path_rate': 0.0,
        # So that one checkpoint serves S1, S2 and both.
        'sensor_dropout': 0.5,
        'global_size': 48,
        'local_size': 32,
        'n_local': 2,
        'global_scale': [0.5, 1.0],
        'local_scale': [0.2, 0.4],
        'prototypes': 512,
        'head_hidden_dim': 256,
        'head_bottleneck_dim': 64,
        'centering': 'sinkhorn_knopp',
        'teacher_temperature': [0.03, 0.03],
        'warmup_teacher_temperature_epochs': 1,
        'warmup_epochs': 0.2,
        'freeze_last_layer_epochs': 0.1,
        'momentum': [0.98, 1.0],
        'lr': 0.003,
        'layer_decay': 1.0,
        'patch_embed_lr_mult': 1.0,
        'weight_decay': [0.04, 0.2],
    }
    data = _data(floods, list(BANDS), window_size=64, batch_size=32)
    configuration = _configuration('geofm.tasks.DINOv2', model, data, epochs=1)
    configuration['trainer']['limit_train_batches'] = DINO_STEPS
    return configuration


def _data(floods: Floods, sensors: Sequence[str], **settings: int) -> dict[str, Any]:
    return {
        'table': str(floods.unlabelled),
        'sensors': list(sensors),
        'bands': [band for sensor in sensors for band in BANDS[sensor]],
        'statistics': 'compute',
        **settings,
    }


def _configuration(
    task: str, model: dict[str, Any], data: dict[str, Any], epochs: int
) -> dict[str, Any]:
    checkpoints = {'save_last': True, 'save_on_train_epoch_end': True}
    return {
        'seed_everything': 0,
        'trainer': {
            'max_epochs': epochs,
            'accelerator': 'cpu',
            'logger': {'class_path': 'CSVLogger', 'init_args': {}},
            'log_every_n_steps': 10,
            'callbacks': [
                {
                    'class_path': 'lightning.pytorch.callbacks.ModelCheckpoint',
                    'init_args': checkpoints,
                },
                {'class_path': 'geofm.callbacks.TrainingTime'},
            ],
        },
        'model': {'class_path': task, 'init_args': model},
        'data': {'class_path': 'geofm.datamodules.RasterArchiveDataModule', 'init_args': data},
    }


def _fit(floods: Floods, output: Path, configuration: dict[str, Any]) -> Path:
    """Run `geofm fit`, unless it has been run with this configuration; its last checkpoint."""
    trainer = configuration['trainer']
    trainer['default_root_dir'] = str(output)
    trainer['logger']['init_args']['save_dir'] = str(output)
    text = yaml.safe_dump(configuration)
    done = output / 'done.yaml'
    if done.exists() and done.read_text() == text:
        return latest_checkpoint(output)
    output.mkdir(parents=True, exist_ok=True)
    config = output / 'config.yaml'
    config.write_text(text)
    geofm(['fit', f'--config={config}', f'--sensors={floods.sensors}'])
    done.write_text(text)
    return latest_checkpoint(output)
