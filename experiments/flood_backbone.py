"""The backbone of `experiments/floods.py`: masked words of both sensors.

It sees the training places alone, without their masks: each after the flood and, where there is
one, before it.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from flood_data import BANDS, WINDOW, Floods
from runs import latest_checkpoint

from geofm.cli import main as geofm

#: Small: there are 459 images to learn from, and one core.
SHAPE = {'embed_dim': 128, 'depth': 4, 'num_heads': 4}
PATCH = 8
NAME = f'geofm_vit_nano_patch{PATCH}_early'

#: Passes over 1,836 windows, and windows of a batch.
EPOCHS = 3
BATCH = 16


def pretrain(floods: Floods, output: Path, seed: int) -> Path:
    """Run `geofm fit` unless it has been run with this configuration.

    Args:
        floods: The places.
        output: Folder of the run.
        seed: Seed of the run.

    Returns:
        Checkpoint of the backbone, which serves S1, S2 and both.
    """
    text = yaml.safe_dump(configuration(floods, output, seed))
    done = output / 'done.yaml'
    if done.exists() and done.read_text() == text:
        return latest_checkpoint(output)
    output.mkdir(parents=True, exist_ok=True)
    config = output / 'config.yaml'
    config.write_text(text)
    geofm(['fit', f'--config={config}', f'--sensors={floods.sensors}'])
    done.write_text(text)
    return latest_checkpoint(output)


def training_minutes(checkpoint: Path) -> float:
    """Return the minutes that the training of a checkpoint took.

    Args:
        checkpoint: Checkpoint of :func:`pretrain`.
    """
    metrics = pd.read_csv(checkpoint.parents[1] / 'metrics.csv')
    return float(metrics['time/training_minutes'].dropna().iloc[-1])


def configuration(floods: Floods, output: Path, seed: int) -> dict[str, Any]:
    """Return the configuration of the run."""
    bands = [band for of_sensor in BANDS.values() for band in of_sensor]
    checkpoints = {'save_last': True, 'save_on_train_epoch_end': True}
    return {
        'seed_everything': seed,
        'trainer': {
            'default_root_dir': str(output),
            'max_epochs': EPOCHS,
            'accelerator': 'cpu',
            'precision': 'bf16-mixed',
            'logger': {'class_path': 'CSVLogger', 'init_args': {'save_dir': str(output)}},
            'log_every_n_steps': 5,
            'callbacks': [
                {
                    'class_path': 'lightning.pytorch.callbacks.ModelCheckpoint',
                    'init_args': checkpoints,
                },
                {'class_path': 'geofm.callbacks.TrainingTime'},
            ],
        },
        'model': {
            'class_path': 'geofm.tasks.MaskedWords',
            'init_args': {
                'model': NAME,
                'in_channels': len(bands),
                'bands': bands,
                'model_args': {
                    'sensors': list(BANDS),
                    'img_size': WINDOW,
                    'init_values': 1.0,
                    'reg_tokens': 0,
                    **SHAPE,
                },
                # One checkpoint serves S1, S2 and both.
                'sensor_dropout': 0.5,
                'global_size': WINDOW,
                'words': 256,
                'target_dim': 64,
                'fit_images': 512,
                'lr': 8e-3,
                'warmup_epochs': 0.3,
            },
        },
        'data': {
            'class_path': 'geofm.datamodules.RasterArchiveDataModule',
            'init_args': {
                'table': str(floods.unlabelled),
                'sensors': list(BANDS),
                'bands': bands,
                'statistics': 'compute',
                'window_size': WINDOW,
                'batch_size': BATCH,
            },
        },
    }
