"""The command that maps classes from embeddings and a few labels."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from geofm.evaluation import Accuracy
from geofm.maps.few_labels import Classified, Fitting, Head, classify_scenes
from geofm.maps.scene import files_by_sensor
from geofm.messages import UsageError
from geofm.printing import say


def classify(
    embeddings: list[Path],
    labels: Path | None = None,
    output: Path = Path('maps'),
    method: Literal['logistic', 'knn', 'ridge'] = 'logistic',
    column: str | None = None,
    block_km: float = 1.0,
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
        embeddings: Files written by `geofm embed` (*_embedding.parquet or .tif), one per scene.
        labels: Vector file of points or polygons, or raster, with the classes. Training samples are
            the patches that contain a point, or whose centre lies in a polygon.
        output: Folder to write to.
        method: Logistic regression or ridge regression on standardised embeddings, or k nearest
            neighbours by cosine similarity.
        column: Column of the vector file that contains the class; by default `class`, or the only
            column.
        block_km: Side of the spatial blocks of the cross-validation, in km.
        head: File head.safetensors of an earlier run, to use instead of --labels.
        s1: Sentinel-1 scene, for the baseline of band statistics.
        s2: Sentinel-2 scene, for the baseline of band statistics.
        scene: Raster of a sensor, given by its key, e.g. --scene s2=FILE, for the baseline of band
            statistics.
        scene_bands: Band names of a raster that does not name its bands, e.g.
            --scene_bands landsat=[B02,B03,B04].
        reference_sensor: Sensor whose grid the embeddings are on, as given to `geofm embed`.
        seed: Seed of the bootstrap intervals.
    """
    if (labels is None) == (head is None):
        raise UsageError('give either --labels FILE to train a head, or --head FILE')
    rasters = files_by_sensor(s1, s2, scene)
    if head is not None:
        if rasters:
            raise UsageError('--scene is only used for the baseline, which needs --labels')
        fitting: Fitting | Head = Head.load(head)
    else:
        assert labels is not None
        fitting = Fitting(
            labels, column, method, block_km, rasters, scene_bands, reference_sensor, seed
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
    """Return a table with the accuracy of embeddings and baseline."""
    table = Table(title=f'Spatially blocked cross-validation, {method}', box=box.SIMPLE_HEAD)
    for name in ('features', 'overall accuracy', 'mean F1', 'mean IoU'):
        table.add_column(name, no_wrap=name != 'features')
    for name, value in accuracy.items():
        scores = [value.overall[s].lines() for s in ('accuracy', 'mean_f1', 'mean_iou')]
        table.add_row(escape(name), *map(escape, scores))
    return table
