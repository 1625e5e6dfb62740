"""The command that makes a map of classes from embeddings and a few labels."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from geofm.evaluation.accuracy import Accuracy
from geofm.maps.few_labels.classify import Classified, Fitting, classify_scenes
from geofm.maps.few_labels.heads import Head
from geofm.maps.scene import files_by_sensor
from geofm.printing import say


def classify(
    embeddings: list[Path],
    labels: Path | None = None,
    output: Path = Path('maps'),
    method: Literal['logistic', 'knn', 'ridge'] = 'logistic',
    column: str | None = None,
    block: float = 1.0,
    head: Path | None = None,
    s1: Path | None = None,
    s2: Path | None = None,
    scene: dict[str, Path] | None = None,
    scene_bands: dict[str, list[str]] | None = None,
    reference_sensor: str | None = None,
    seed: int = 0,
) -> None:
    """Map classes from embeddings and a few labels, without training a network.

    Args:
        embeddings: Files that `geofm embed` wrote, *_embedding.parquet or .tif, one a scene.
        labels: Points, polygons or a raster with a class. Patches that hold a point, or whose
            centre lies in a polygon, are the samples.
        output: Folder to write to.
        method: Logistic regression or ridge regression on standardised embeddings, or the votes of
            the nearest by cosine.
        column: Column of the labels that holds the class; `class` or the only one if not given.
        block: Side in km of the blocks of ground that the cross-validation leaves out as a whole.
        head: head.safetensors of an earlier run, instead of labels.
        s1: Sentinel-1 scene, for the baseline.
        s2: Sentinel-2 scene, for the baseline.
        scene: Rasters of the scene of any sensors, as --scene s2=FILE: the baseline of band
            statistics is reported too.
        scene_bands: Names of the bands of these files, if they do not say.
        reference_sensor: Sensor whose grid the embeddings are on, as given to `geofm embed`.
        seed: Seed of the intervals.
    """
    if (labels is None) == (head is None):
        raise ValueError('give --labels FILE to learn from, or --head FILE of an earlier run')
    rasters = files_by_sensor(s1, s2, scene)
    if head is not None:
        if rasters:
            raise ValueError('--scene is for the baseline, which needs --labels')
        fitting: Fitting | Head = Head.load(head)
    else:
        assert labels is not None
        fitting = Fitting(
            labels, column, method, block, rasters, scene_bands, reference_sensor, seed
        )
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    made = classify_scenes(embeddings, output, fitting, command)
    _print(made, method)
    for path in made.files:
        say(path)


def _print(made: Classified, method: str) -> None:
    console = Console()
    if made.counts:
        say('samples: ' + ', '.join(f'{name} {count}' for name, count in made.counts.items()))
    if made.accuracy:
        console.print(_summary(made.accuracy, method))
        console.print(made.accuracy['embeddings'].table('Embeddings, cross-validated'))
    for note in made.notes:
        say(f'note: {note}')


def _summary(accuracy: Mapping[str, Accuracy], method: str) -> Table:
    """Embeddings beside their baseline."""
    table = Table(title=f'Spatially blocked cross-validation, {method}', box=box.SIMPLE_HEAD)
    for name in ('features', 'overall accuracy', 'mean F1', 'mean IoU'):
        table.add_column(name, no_wrap=name != 'features')
    for name, value in accuracy.items():
        scores = [value.overall[s].lines() for s in ('accuracy', 'mean_f1', 'mean_iou')]
        table.add_row(escape(name), *map(escape, scores))
    return table
