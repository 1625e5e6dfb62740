"""Pretraining runs and features of labelled windows, shared by the experiments."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from geofm.datasets import SampleLandCover
from geofm.evaluation import knn_accuracy
from geofm.evaluation.backbones import PATCH_WORDS_NAME, BackboneConfig, Encoder, build_backbone
from geofm.models import MultiSensorViT
from geofm.sensors import band_indices
from geofm.transforms import Normalize

#: The configurations of the quick start, and of its version with DINOv2.
QUICKSTART = 'configs/pretrain/quickstart.yaml'
DINOV2 = 'configs/pretrain/quickstart_dinov2.yaml'
NEIGHBOURS = 5

#: Prefixes of the arguments of task and data module.
TASK, DATA = '--model.init_args.', '--data.init_args.'


def geofm(*args: str | Path) -> None:
    """Print a geofm command and run it in a separate process."""
    words = [str(arg) for arg in args]
    print(f'\n$ geofm {shlex.join(words)}', flush=True)
    subprocess.run([sys.executable, '-m', 'geofm', *words], check=True)


def latest_checkpoint(root: Path) -> Path:
    """Return the checkpoint of the newest run below a folder."""
    runs = sorted(root.glob('lightning_logs/version_*'), key=lambda run: int(run.name[8:]))
    return runs[-1] / 'checkpoints' / 'last.ckpt'


def pretrain(config: str, arguments: list[str], epochs: int, seed: int, output: Path) -> Path:
    """Run a configuration with other arguments unless it has been run.

    Args:
        config: Path of the configuration.
        arguments: Arguments of `geofm fit`.
        epochs: Number of epochs.
        seed: Seed of the run.
        output: Folder of the run.

    Returns:
        The last checkpoint.
    """
    if not (output / 'done').exists():
        command = ['fit', f'--config={config}', f'--seed_everything={seed}']
        command += [f'--trainer.default_root_dir={output}', f'--trainer.max_epochs={epochs}']
        geofm(*command, '--trainer.limit_val_batches=0', *arguments)
        (output / 'done').touch()
    return latest_checkpoint(output)


@cache
def windows(dataset: SampleLandCover) -> list[dict[str, Tensor]]:
    """Return normalised batches of the windows of a data set in order; cached."""
    normalise = Normalize(dataset.bands)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=64)
    return [
        normalise({k: v for k, v in batch.items() if isinstance(v, Tensor)}) for batch in loader
    ]


@torch.inference_mode()
def pooled_features(
    encoder: Encoder, dataset: SampleLandCover, bands: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the single feature vector of each window from a baseline, and labels."""
    found, labels = [], []
    for batch in of_bands(dataset, bands):
        found.append(encoder.pooled(batch)[:, 0])
        labels.append(batch['label'])
    # Baselines have no CLS token: their vector takes the place of the mean of the patches.
    return {'patches': torch.cat(found)}, torch.cat(labels)


def of_bands(dataset: SampleLandCover, bands: Sequence[str]) -> list[dict[str, Tensor]]:
    """Return the batches of :func:`windows` with a subset of their bands."""
    channels = band_indices(bands, dataset.bands)
    return [{**batch, 'image': batch['image'][:, channels]} for batch in windows(dataset)]


def patch_words(dataset: SampleLandCover, bands: Sequence[str], seed: int) -> Encoder:
    """Return the patch words encoder of `geofm benchmark`, fitted to a data set."""
    encoder = build_backbone(BackboneConfig(PATCH_WORDS_NAME), bands, {}, seed).encoder
    encoder.learn(of_bands(dataset, bands), len(dataset), seed)
    return encoder


@torch.inference_mode()
def token_features(
    backbone: MultiSensorViT, dataset: SampleLandCover, given: tuple[bool, ...] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the L2-normalised CLS token and mean of patches, and labels.

    *given* says which sensors the backbone sees.
    """
    found: dict[str, list[Tensor]] = {'CLS': [], 'patches': []}
    labels = []
    for batch in of_bands(dataset, backbone.bands):
        image = batch['image']
        present = None if given is None else torch.tensor([given]).expand(len(image), -1)
        tokens = backbone.forward_features(image, batch.get('dates'), present=present)
        found['CLS'].append(tokens[:, 0])
        found['patches'].append(tokens[:, backbone.num_prefix_tokens :].mean(dim=1))
        labels.append(batch['label'])
    normalised = {k: torch.nn.functional.normalize(torch.cat(v), dim=1) for k, v in found.items()}
    return normalised, torch.cat(labels)


def few_label_accuracy(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, per_class: int, draws: int = 100
) -> float:
    """Mean k-NN accuracy when only a few windows per class have labels.

    Args:
        bank: Features of the windows to draw from, shape (N, D).
        labels: Their labels, shape (N,).
        queries: Features to classify, shape (M, D).
        truth: Their labels, shape (M,).
        per_class: Number of labelled windows per class.
        draws: Number of random draws to average over; all features get the same draws.

    Returns:
        Accuracy in [0, 1].
    """
    generator = torch.Generator().manual_seed(0)
    members = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
    total = 0.0
    for _ in range(draws):
        drawn = [m[torch.randperm(len(m), generator=generator)[:per_class]] for m in members]
        rows = torch.cat(drawn)
        total += knn_accuracy(bank[rows], labels[rows], queries, truth, NEIGHBOURS)
    return total / draws
