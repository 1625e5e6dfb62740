"""Command-line interface: ``geofm fit --config ...`` and the commands around it."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchgeo.datamodules
import torchgeo.tasks  # noqa: F401
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningCLI
from torchgeo.datamodules import BaseDataModule
from torchgeo.tasks import BaseTask

import geofm

# Importing these lets a YAML name their classes without the module, and registers our models.
import geofm.callbacks
import geofm.datamodules
import geofm.tasks

from .datasets import write_sample_data
from .evaluation import (
    backbone_encoder,
    band_statistics_encoder,
    benchmark_knn,
    print_scores,
    write_scores,
)
from .maps import attention_map
from .models import create_backbone, export_torchgeo, load_backbone, read_hparams


def sample_data(dest: Path, seed: int = 0) -> None:
    """Write a small generated data set in the layout of SEN12MS-CR-TS.

    It has land cover for evaluation. It is generated, not observed: no result on it is science.

    Args:
        dest: Folder to write to.
        seed: Seed of the landscape.
    """
    print(write_sample_data(dest, seed=seed))


def attention(
    checkpoint: Path,
    output: Path,
    s1: Path | None = None,
    s2: Path | None = None,
    block: int = -1,
    window: int = 224,
    overlap: float = 0.5,
    batch_size: int = 8,
    upsampling: Literal['nearest', 'bilinear'] = 'nearest',
    device: str | None = None,
) -> None:
    """Draw where a backbone looks, as a GeoTIFF that lies on the scene and a PNG.

    Args:
        checkpoint: Checkpoint that `geofm fit` wrote.
        output: Folder to write to.
        s1: Sentinel-1 scene: VV and VH in dB.
        s2: Sentinel-2 scene: 13 bands as DN.
        block: Block of the ViTs; negative counts from the last.
        window: Side of a window in pixels, a multiple of the patch size.
        overlap: Least share of a window that the next one covers too, in [0, 1).
        batch_size: Windows a forward pass.
        upsampling: How a pixel gets the value of its patch.
        device: Where to compute, e.g. cuda; chosen by itself if not given.
    """
    result = attention_map(
        load_backbone(checkpoint),
        s1,
        s2,
        output,
        block=block,
        window=window,
        overlap=overlap,
        batch_size=batch_size,
        upsampling=upsampling,
        checkpoint=checkpoint,
        device=device,
    )
    print(f'{result.raster}\n{result.figure}')


def benchmark(
    checkpoint: Path,
    data: BaseDataModule,
    output: Path | None = None,
    k: Sequence[int] = (5, 20),
    seed: int = 0,
    device: str = 'cpu',
) -> None:
    """Measure a pretrained backbone by k-NN, beside its floors.

    The floors are the same backbone with random weights, and the mean and standard deviation of
    every band.

    Args:
        checkpoint: Checkpoint that `geofm fit` wrote.
        data: Labelled data: a classification data module.
        output: JSON file for the scores.
        k: Numbers of neighbours.
        seed: Seed of the random weights.
        device: Where to compute, e.g. cuda.
    """
    pretrained = load_backbone(checkpoint).to(device)
    seed_everything(seed, verbose=False)
    untrained = create_backbone(read_hparams(checkpoint)).eval().to(device)
    encoders = {
        'pretrained': backbone_encoder(pretrained),
        'random weights': backbone_encoder(untrained),
        'band mean and std': band_statistics_encoder,
    }
    scores = benchmark_knn(encoders, data, k, device)
    if output is not None:
        write_scores(scores, output)
    print_scores(scores, f'Accuracy on {scores[0].test} test images, {scores[0].train} in the bank')


def export(checkpoint: Path, output: Path, to: Literal['torchgeo'] = 'torchgeo') -> None:
    """Write a checkpoint's backbone for another tool.

    Args:
        checkpoint: Checkpoint that `geofm fit` wrote.
        output: File to write.
        to: Whose format: `torchgeo` is what SemanticSegmentation takes as weights; Classification
            takes the checkpoint itself.
    """
    print(export_torchgeo(checkpoint, output))


@dataclass(frozen=True, slots=True)
class Command:
    """A command beside LightningCLI's.

    Attributes:
        function: What it runs; its signature gives the arguments.
        summary: One line of help.
        positional: Whether required arguments are given by position.
    """

    function: Callable[..., Any]
    summary: str
    positional: bool = False


COMMANDS: dict[str, Command] = {
    'sample-data': Command(sample_data, 'write a small generated data set', positional=True),
    'attention': Command(attention, 'draw attention maps that lie on a scene'),
    'benchmark': Command(benchmark, 'measure a backbone by k-NN, beside its floors'),
    'export': Command(export, "write a checkpoint's backbone for another tool"),
}

LIGHTNING_COMMANDS: dict[str, str] = {
    'fit': 'pretrain or fine-tune, from a YAML file',
    'validate': 'evaluate on the validation split',
    'test': 'evaluate on the test split',
    'predict': 'predict on the prediction split',
}


def _help() -> str:
    lines = ['usage: geofm COMMAND [ARGUMENTS]   (geofm COMMAND --help lists them)', '']
    lines += [geofm.__doc__ or '', '', 'Train, with Lightning:']
    lines += [f'  {name:<12} {summary}' for name, summary in LIGHTNING_COMMANDS.items()]
    lines += ['', 'Around it:']
    lines += [f'  {name:<12} {command.summary}' for name, command in COMMANDS.items()]
    lines += [
        '',
        'Start:',
        '  geofm sample-data data/sample',
        '  geofm fit --config configs/pretrain/quickstart.yaml',
    ]
    return '\n'.join(lines)


def _train(args: list[str]) -> None:
    """Run one of LightningCLI's sub-commands."""
    # A folder of SEN12MS-CR-TS holds 15,000 files: GDAL must not list it for each one.
    os.environ.setdefault('GDAL_DISABLE_READDIR_ON_OPEN', 'EMPTY_DIR')
    torch.set_float32_matmul_precision('high')
    LightningCLI(
        model_class=BaseTask,
        datamodule_class=BaseDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={'overwrite': True},
        parser_kwargs={'version': geofm.__version__},
        args=args,
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: Arguments; those of the process by default.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ('-h', '--help'):
        print(_help())
    elif args[0] == '--version':
        print(f'geofm {geofm.__version__}')
    elif args[0] in LIGHTNING_COMMANDS:
        _train(args)
    elif args[0] in COMMANDS:
        command = COMMANDS[args[0]]
        try:
            auto_cli(
                command.function,
                args=args[1:],
                as_positional=command.positional,
                prog=f'geofm {args[0]}',
            )
        except (ValueError, OSError) as error:
            sys.exit(f'geofm {args[0]}: {error}')
    else:
        sys.exit(f"geofm: no command '{args[0]}'\n\n{_help()}")
