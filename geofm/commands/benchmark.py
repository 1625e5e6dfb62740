"""The command that compares backbones with baselines on labelled data."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text
from torchgeo.datamodules import BaseDataModule

# Imported so that data modules can be given without their import path, as TorchGeo's can.
import geofm.datamodules  # noqa: F401
from geofm.evaluation import (
    BackboneConfig,
    Probe,
    ProbeSettings,
    labelled_data,
    print_report,
    run_benchmark,
    write_figures,
    write_report,
)
from geofm.evaluation.backbones import Missing
from geofm.evaluation.data import Task
from geofm.locking import locked_folder
from geofm.printing import printable, say


def benchmark(
    checkpoint: Path | None = None,
    *,
    data: BaseDataModule,
    backbones: list[str | BackboneConfig] | None = None,
    output: Path | None = None,
    task: Task | None = None,
    probes: list[Probe] | None = None,
    k: Sequence[int] = (5, 20),
    steps: int = 2000,
    epochs: int = 10,
    missing_bands: Missing | None = None,
    limit: int | None = None,
    ignore_index: int | None = None,
    cache: Path | None = Path('output/features'),
    seed: int = 0,
    device: str = 'cpu',
) -> None:
    """Compare backbones with baselines on labelled data.

    The baselines are the same architectures with random weights, and the mean and standard
    deviation of each band. Bands are matched by name. Features are computed once and cached.

    Args:
        checkpoint: Checkpoint written by `geofm fit`, an export of one, or the name of weights in
            the package; named 'pretrained' in the table. Also accepted as a positional argument.
        data: Class name of a data module of TorchGeo or geofm, for classification, multi-label
            classification, segmentation or regression of maps. Its arguments are given as
            --data.ARGUMENT VALUE, and arguments that it passes on to its dataset, such as root, as
            --data.dict_kwargs.ARGUMENT VALUE. See --data.help CLASS.
        backbones: Backbones to measure: checkpoints, model names of geofm or timm, names of
            TorchGeo weights, `rcf` (random convolutional features) or `patch_words`. An entry may
            be a mapping with further options, see --backbones.help.
        output: Folder for scores.json, .csv, .md and .png, and maps.png. By default, the scores are
            only printed.
        task: Task to evaluate. Needed only if samples have both a label and a mask.
        probes: Probes. For images any of `knn`, `knn_whitened`, `linear` and `logistic`, by default
            all but `knn_whitened`; for segmentation
            and regression any of `linear`, `dpt`, `dpt_tuned`, `upernet` and
            `upernet_tuned`, by default `linear`.
        k: Numbers of neighbours of k-NN.
        steps: Training steps of the linear probe.
        epochs: Training epochs of the probes `dpt`, `upernet` and their `_tuned` variants.
        missing_bands: Value of a band that the backbone needs and the data lack: `mean` (of the
            band) or `zero`. By default a missing band is an error.
        limit: Maximum number of samples of each split, drawn at random with --seed; by default all.
        ignore_index: Mask value of pixels without a label; 255 by default.
        cache: Folder of cached features; null disables the cache.
        seed: Random seed.
        device: Device to compute on, e.g. cuda.
    """
    console = Console()
    configs = [b if isinstance(b, BackboneConfig) else BackboneConfig(b) for b in backbones or []]
    if checkpoint is not None:
        configs.insert(0, BackboneConfig(str(checkpoint), name='pretrained'))
    configs = [replace(c, missing_bands=c.missing_bands or missing_bands) for c in configs]
    settings = ProbeSettings(probes, k, steps, epochs, seed, device)
    with nullcontext() if output is None else locked_folder(output):
        report = run_benchmark(
            configs,
            labelled_data(data, task, ignore_index, limit, seed),
            settings,
            cache,
            lambda line: console.print(Text(printable(line), style='dim')),
        )
        print_report(report, console)
        if output is None:
            return
        asked = {
            'backbones': [config.model for config in configs],
            'probes': None if probes is None else list(probes),
            'k': list(k),
            'steps': steps,
            'epochs': epochs,
            'limit': limit,
            'seed': seed,
            'device': device,
        }
        for path in (*write_report(report, output, asked), *write_figures(report, output)):
            say(path)
