"""What experiments share: pretraining runs and features of labelled windows."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from geofm.datasets import SampleLandCover
from geofm.models import MultiSensorViT
from geofm.sensors import band_indices
from geofm.transforms import Normalize

CONFIG = 'configs/pretrain/quickstart.yaml'
NEIGHBOURS = 5

#: Where a config's arguments are.
TASK, DATA = '--model.init_args.', '--data.init_args.'


def latest_checkpoint(root: Path) -> Path:
    """Checkpoint of the newest run under a folder."""
    runs = sorted(root.glob('lightning_logs/version_*'), key=lambda run: int(run.name[8:]))
    return runs[-1] / 'checkpoints' / 'last.ckpt'


def pretrain(arguments: list[str], epochs: int, seed: int, output: Path) -> Path:
    """Run the quickstart with other arguments, unless it has been run."""
    if not (output / 'done').exists():
        command = ['fit', f'--config={CONFIG}', f'--seed_everything={seed}']
        command += [f'--trainer.default_root_dir={output}', f'--trainer.max_epochs={epochs}']
        command += ['--trainer.limit_val_batches=0', *arguments]
        print(f'\n$ geofm {shlex.join(command)}', flush=True)
        subprocess.run([sys.executable, '-m', 'geofm', *command], check=True)
        (output / 'done').touch()
    return latest_checkpoint(output)


def windows(dataset: SampleLandCover) -> Iterator[dict[str, Tensor]]:
    """Normalised batches of a data set's windows, in its order."""
    normalise = Normalize(dataset.bands)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=64)
    for batch in loader:
        yield normalise({k: v for k, v in batch.items() if isinstance(v, Tensor)})


@torch.inference_mode()
def token_features(
    backbone: MultiSensorViT, dataset: SampleLandCover, given: tuple[bool, ...] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """CLS token and mean of patches, L2-normalised, and labels; *given*: sensors that it sees."""
    channels = band_indices(backbone.bands, dataset.bands)
    found: dict[str, list[Tensor]] = {'CLS': [], 'patches': []}
    labels = []
    for batch in windows(dataset):
        image = batch['image'][:, channels]
        present = None if given is None else torch.tensor([given]).expand(len(image), -1)
        tokens = backbone.forward_features(image, batch.get('dates'), present=present)
        found['CLS'].append(tokens[:, 0])
        found['patches'].append(tokens[:, backbone.num_prefix_tokens :].mean(dim=1))
        labels.append(batch['label'])
    normalised = {k: torch.nn.functional.normalize(torch.cat(v), dim=1) for k, v in found.items()}
    return normalised, torch.cat(labels)
