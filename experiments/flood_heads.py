"""Linear probe and supervised U-Net of `experiments/floods.py`."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from flood_data import BANDS, LEGEND, SIDE, WINDOW, Floods, Pixels, Split
from rich.progress import track
from torch import Tensor
from torchgeo.tasks import SemanticSegmentation

from geofm.cli import main as geofm
from geofm.datamodules import LabelledArchiveDataModule
from geofm.datasets.archive.labelled import LabelledArchive
from geofm.evaluation import BackboneConfig, ProbeSettings, labelled_data
from geofm.evaluation.backbones import PATCH_WORDS_NAME, ViTEncoder, build_backbone
from geofm.evaluation.benchmark import cached_features
from geofm.evaluation.data import LabelledData
from geofm.evaluation.features import FeatureCache, Features, prepared_batches
from geofm.evaluation.probes.dense import dense_probe


class BlocksEncoder(ViTEncoder):
    """Encoder with the patch tokens of the last four blocks of a ViT, side by side."""

    def patches(self, batch: Mapping[str, Any]) -> Tensor:
        """Return patch tokens of shape (B, 4 D, h, w)."""
        return torch.cat(
            [patches for patches, _ in self._tokens(batch, self.blocks, 'NCHW')], dim=1
        )


def data_arguments(floods: Floods, sensors: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of the data module of the labelled places."""
    return {
        'table': str(floods.table),
        'sensors': list(sensors),
        'bands': [band for sensor in sensors for band in BANDS[sensor]],
        'labels': 'flood.class',
        'classes': {c.name: c.value for c in LEGEND.classes},
        'window_size': WINDOW,
        'split': {'by': 'column'},
        'batch_size': 16,
    }


def linear_probe(
    floods: Floods,
    checkpoint: Path,
    sensors: Sequence[str],
    seed: int,
    splits: Sequence[Split],
    features: Literal['pretrained', 'random', 'patch words'],
    steps: int,
) -> dict[Split, Pixels]:
    """Train the linear probe of `geofm benchmark` on frozen patch tokens or baseline features.

    Of a network these are the tokens of its last four blocks, side by side. It encodes each sensor
    by itself, as if the other were missing, and a head of both sees the tokens of both.

    Args:
        floods: The places.
        checkpoint: Checkpoint of the backbone.
        sensors: Keys of the sensors that it sees.
        seed: Seed of the head, and of random weights.
        splits: Splits to map.
        features: Those of the backbone, of the same backbone with random weights, or bags of patch
            words, which are learned from the images of the training places.
        steps: Steps of the head.

    Returns:
        Classes (N, H, W) of each split.
    """
    words = features == 'patch words'
    seen = [sensors] if words else [[sensor] for sensor in sensors]
    parts = [_features(floods, checkpoint, tuple(keys), seed, features) for keys in seen]
    data, found = parts[0][0], dict(parts[0][1])
    for split, first in found.items():
        others = [part[1][split] for part in parts[1:]]
        assert all(torch.equal(first.targets, other.targets) for other in others)
        values = torch.cat([first.values, *(other.values for other in others)], dim=1)
        found[split] = Features(values, first.targets)
    # The head is chosen on the validation split, whichever splits are mapped.
    values, targets = (
        torch.cat([getattr(found[split], name) for split in splits])
        for name in ('values', 'targets')
    )
    asked = {**found, 'test': Features(values, targets)}
    maps = dense_probe(asked, 'segmentation', LEGEND.size, 255, steps, seed).scores
    of_splits = maps.split([len(found[split].targets) for split in splits])
    return {
        split: assemble(data.splits[split], part.numpy())
        for split, part in zip(splits, of_splits, strict=True)
    }


# The features of single sensors are used again for both.
@lru_cache(maxsize=2)
def _features(
    floods: Floods,
    checkpoint: Path,
    sensors: tuple[str, ...],
    seed: int,
    features: Literal['pretrained', 'random', 'patch words'],
) -> tuple[LabelledData, dict[Split, Features]]:
    """Return the features of all splits; see :func:`linear_probe`."""
    data = labelled_data(LabelledArchiveDataModule(**data_arguments(floods, sensors)))
    words = features == 'patch words'
    backbone = build_backbone(
        BackboneConfig(PATCH_WORDS_NAME if words else str(checkpoint)),
        data.bands,
        data.statistics,
        seed,
        random=features == 'random',
    )
    if backbone.model is not None:
        backbone.encoder = BlocksEncoder(backbone.model)
    images = prepared_batches(backbone.adapter, data, 'train')
    backbone.encoder.learn(images, data.size('train'), seed)
    settings, cache = ProbeSettings(seed=seed), FeatureCache(None, print)
    every: tuple[Split, ...] = ('train', 'val', 'test')
    # Networks as they were pretrained.
    with torch.autocast('cpu', torch.bfloat16, enabled=not words):
        found = {split: cached_features(backbone, data, split, settings, cache) for split in every}
    return data, found


def u_net(
    floods: Floods,
    sensors: Sequence[str],
    seed: int,
    splits: Sequence[Split],
    output: Path,
    epochs: int,
) -> dict[Split, Pixels]:
    """`geofm fit` of TorchGeo's U-Net from scratch; the epoch is chosen on the validation places.

    Args:
        floods: The places.
        sensors: Keys of the sensors that it sees.
        seed: Seed of the weights and of the order of samples.
        splits: Splits to map.
        output: Folder of the run.
        epochs: Number of epochs.

    Returns:
        Classes (N, H, W) of each split.
    """
    arguments = data_arguments(floods, sensors)
    best = {
        'dirpath': str(output),
        'filename': 'best',
        'monitor': 'val_AverageJaccardIndex',
        'mode': 'max',
        'enable_version_counter': False,
    }
    configuration = {
        'seed_everything': seed,
        'trainer': {
            'default_root_dir': str(output),
            'max_epochs': epochs,
            'accelerator': 'cpu',
            'precision': 'bf16-mixed',
            'num_sanity_val_steps': 0,
            'log_every_n_steps': 10,
            'logger': {'class_path': 'CSVLogger', 'init_args': {'save_dir': str(output)}},
            'callbacks': [
                {'class_path': 'lightning.pytorch.callbacks.ModelCheckpoint', 'init_args': best},
                {'class_path': 'geofm.callbacks.TrainingTime'},
            ],
        },
        'model': {
            'class_path': 'torchgeo.tasks.SemanticSegmentation',
            'init_args': {
                'model': 'unet',
                'backbone': 'resnet18',
                'in_channels': len(arguments['bands']),
                'num_classes': LEGEND.size,
                'ignore_index': 255,
                'lr': 1e-3,
            },
        },
        'data': {
            'class_path': 'geofm.datamodules.LabelledArchiveDataModule',
            'init_args': arguments,
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    config = output / 'config.yaml'
    config.write_text(yaml.safe_dump(configuration))
    geofm(['fit', f'--config={config}', f'--sensors={floods.sensors}'])
    return _predict(output / 'best.ckpt', arguments, splits)


@torch.inference_mode()
def _predict(
    checkpoint: Path, arguments: dict[str, Any], splits: Sequence[Split]
) -> dict[Split, Pixels]:
    """Map the places of the splits with a trained U-Net."""
    task = SemanticSegmentation.load_from_checkpoint(checkpoint, weights_only=True).eval()
    datamodule = LabelledArchiveDataModule(**arguments)
    for stage in ('fit', 'test'):
        datamodule.setup(stage)
    state = torch.load(checkpoint, weights_only=True)
    datamodule.load_state_dict(state[type(datamodule).__name__])
    found: dict[Split, Pixels] = {}
    for split in splits:
        maps = []
        loader = getattr(datamodule, f'{split}_dataloader')()
        for batch in track(loader, f'{checkpoint.parent.name}: {split}'):
            logits = task(datamodule.aug(batch)['image'])
            maps.append(logits.argmax(dim=1).numpy())
        found[split] = assemble(getattr(datamodule, f'{split}_dataset'), np.concatenate(maps))
    return found


def assemble(dataset: Any, windows: Any) -> Pixels:
    """Assemble the maps of places from those of their windows.

    Args:
        dataset: The data set of the windows, in their order.
        windows: Classes (N, h, w).

    Returns:
        Classes (P, H, W), places in the order of their names.
    """
    assert isinstance(dataset, LabelledArchive)
    places: dict[str, Pixels] = {}
    for i, window in enumerate(windows):
        name = dataset.files_of(i)[0].stem
        row, col, height, width = dataset.archive.matches.scene(i)[2]
        place = places.setdefault(name, np.full((SIDE, SIDE), 255, np.uint8))
        place[row : row + height, col : col + width] = window
    return np.stack([places[name] for name in sorted(places)])
