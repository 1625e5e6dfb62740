"""The command that measures backbones on labelled data."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text
from torchgeo.datamodules import BaseDataModule

# Imported so that data modules can be named without their module; TorchGeo's already are.
import geofm.datamodules  # noqa: F401
from geofm.evaluation import (
    BackboneConfig,
    Probe,
    ProbeSettings,
    labelled_data,
    print_report,
    run_benchmark,
    write_report,
)
from geofm.evaluation.backbones import Missing
from geofm.evaluation.data import Task
from geofm.evaluation.figures import write_figures
from geofm.locking import locked_folder
from geofm.printing import printable, say


def benchmark(
    data: BaseDataModule,
    backbones: list[str | BackboneConfig] | None = None,
    checkpoint: Path | None = None,
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
    """Measure backbones on labelled data, beside baselines.

    The baselines are the same architectures with random weights, and the mean and standard
    deviation of every band. Bands are matched by name; features are computed once and kept.

    Args:
        data: Labelled data: any data module for classes, several labels, maps of classes or maps of
            values.
        backbones: What to measure: checkpoints, names of geofm or timm, TorchGeo's weights, `rcf`.
            An entry may also say more than a name, see `geofm.evaluation.BackboneConfig`.
        checkpoint: One checkpoint that `geofm fit` wrote, called 'pretrained' in the table.
        output: Folder for scores.json, .csv, .md and .png, and maps.png.
        task: What is to be told, if samples have both a label and a mask.
        probes: How to measure: `knn`, `knn_whitened`, `linear`, `logistic`; for maps `linear`,
            `dpt`, `dpt_tuned`, `upernet`, `upernet_tuned`.
        k: Numbers of neighbours.
        steps: Steps of the linear probe.
        epochs: Epochs of DPT and UPerNet.
        missing_bands: What stands for a single band of a backbone that the data lack: its `mean` or
            `zero`. By default that is an error.
        limit: At most so many samples of each split, drawn with the seed.
        ignore_index: Class of maps that does not count.
        cache: Folder of features; null keeps none.
        seed: Seed of all that is drawn.
        device: Where to compute, e.g. cuda.
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
