"""Maps of classes from embeddings and a few labels, without training a network."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from geofm import __version__, lonlat
from geofm.atomic import atomic_file, check_not_overwritten, write_atomically
from geofm.datasets.labels import LabelSource, open_labels
from geofm.evaluation import Accuracy
from geofm.legend import NO_CLASS
from geofm.locking import locked_folder
from geofm.maps.few_labels.cross_validation import band_statistics, blocks_of, cross_validate
from geofm.maps.few_labels.heads import Head, Method
from geofm.maps.few_labels.samples import Samples, samples_on
from geofm.maps.make.class_products import draw_classes
from geofm.maps.make.embedding_files import Embeddings
from geofm.maps.make.windows import Floats, Strip
from geofm.maps.make.writer import Encoding, write_pixels
from geofm.printing import counted

#: Rasters that are written for each scene.
_PRODUCTS = ('classes', 'class_probability', 'uncertainty')

_HEAD, _REPORT = 'head.safetensors', 'classify.json'


@dataclass(frozen=True)
class Classified:
    """Result of a classification.

    Attributes:
        files: The files written.
        accuracy: Cross-validated accuracy by kind of features. Empty if a fitted head was given, or
            if all samples lie in one block.
        counts: Number of samples of each class, by name.
        notes: Notes on the interpretation of the accuracy.
    """

    files: tuple[Path, ...]
    accuracy: Mapping[str, Accuracy]
    counts: Mapping[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Fitting:
    """Labels, and how a classifier is fitted to them.

    Attributes:
        labels: File of labels.
        column: Column of the class.
        method: Method of classification.
        block: Side in km of the blocks of the cross-validation.
        files: Rasters of the scene by sensor, for the baseline.
        names: Names of the bands of a file by sensor, for files without band descriptions.
        reference: Sensor whose grid the patches are on.
        seed: Seed of the intervals.
    """

    labels: Path
    column: str | None = None
    method: Method = 'logistic'
    block: float = 1.0
    files: Mapping[str, Path] | None = None
    names: Mapping[str, Sequence[str]] | None = None
    reference: str | None = None
    seed: int = 0


def classify_scenes(
    paths: Sequence[Path], output: Path, fitting: Fitting | Head, command: str = ''
) -> Classified:
    """Classify every patch of scenes.

    Args:
        paths: Files of embeddings, one per scene.
        output: Folder to write to: for each scene ``*_classes.tif``, ``*_class_probability.tif``,
            ``*_uncertainty.tif`` and ``*_picture.png``; with labels also ``head.safetensors`` and
            the report of the cross-validation.
        fitting: Labels to fit a classifier to, or a fitted head.
        command: Command to write to the tags of the files.

    Returns:
        The result.

    Raises:
        FileExistsError: If the labels would be overwritten.
        FileNotFoundError: If a file does not exist.
        ValueError: If a file cannot be used, if embeddings are of different models, or if there are
            too few labels.
    """
    scenes = _open(paths)
    with locked_folder(output):
        if isinstance(fitting, Head):
            head, report = fitting, Classified((), {}, {}, ())
            for scene in scenes:
                head.check(scene.path, scene.weights_sha256, scene.dimensions)
        else:
            head, report = _fit(scenes, output, fitting)
        files = list(report.files)
        with Progress() as progress:
            for scene in progress.track(scenes, description='Classifying'):
                files += _write(scene, head, output, command)
    return replace(report, files=tuple(files))


def _open(paths: Sequence[Path]) -> list[Embeddings]:
    scenes = [Embeddings.open(path) for path in paths]
    if not scenes:
        raise ValueError('no embeddings: give *_embedding.parquet written by `geofm embed`')
    first = scenes[0]
    stems: dict[str, Path] = {}
    for scene in scenes:
        if (scene.weights_sha256, scene.dimensions) != (first.weights_sha256, first.dimensions):
            raise ValueError(
                f'{first.path} and {scene.path}: embeddings of different models; make both with '
                'the same checkpoint'
            )
        if scene.stem in stems:
            raise ValueError(
                f'{stems[scene.stem]} and {scene.path}: the products of both would be named '
                f'{scene.stem}_*; rename one, or classify it with --head into another folder'
            )
        stems[scene.stem] = scene.path
    return scenes


def _fit(scenes: Sequence[Embeddings], output: Path, fitting: Fitting) -> tuple[Head, Classified]:
    if not (math.isfinite(fitting.block) and fitting.block > 0):
        raise ValueError(f'block {fitting.block:g}: the side of a block must be positive, in km')
    if fitting.files and len(scenes) > 1:
        raise ValueError(
            'the baseline needs the rasters of a single scene; give one file of embeddings, or '
            'omit --scene'
        )
    labels = open_labels(fitting.labels, column=fitting.column)
    maps = [_path(scene, output, product) for scene in scenes for product in _PRODUCTS]
    check_not_overwritten(labels.files, [output / _HEAD, output / _REPORT, *maps])
    legend = labels.legend
    parts = [_samples(scene, labels) for scene in scenes]
    vectors = np.concatenate([part[1] for part in parts])
    values = np.concatenate([part[0].values for part in parts])
    if not len(values):
        grids = '; '.join(lonlat.describe(lonlat.bounds(scene.grid)) for scene in scenes)
        raise ValueError(
            f'{fitting.labels}: no label lies on a patch with data; the scenes are at {grids}. '
            'Check the CRS of the labels'
        )
    blocks = np.concatenate(
        [
            blocks_of(scene.grid, samples.rows, samples.cols, fitting.block)
            for scene, (samples, _) in zip(scenes, parts, strict=True)
        ]
    )
    first = scenes[0]
    try:
        head = Head.fit(
            fitting.method,
            vectors,
            values,
            legend,
            first.weights_sha256,
            first.table.tags.get('model', ''),
        )
    except ValueError as error:
        raise ValueError(f'{fitting.labels}: {error}') from error
    features = {'embeddings': vectors}
    if fitting.files:
        features['band statistics'] = band_statistics(
            fitting.files,
            first.grid,
            parts[0][0].rows,
            parts[0][0].cols,
            fitting.names,
            fitting.reference,
        )
    found = {
        name: cross_validate(
            fitting.method, given, values, blocks, legend, fitting.block, fitting.seed
        )
        for name, given in features.items()
    }
    accuracy = {name: value for name, value in found.items() if value is not None}
    counts = {c.name: int((values == c.value).sum()) for c in legend.classes}
    samples = [part[0] for part in parts]
    notes = _notes(fitting, counts, samples, _outside(scenes, samples), accuracy)
    return head, _save(output, head, Classified((), accuracy, counts, notes), fitting)


def _samples(scene: Embeddings, labels: LabelSource) -> tuple[Samples, Floats]:
    """Return the labelled patches that have an embedding, and their embeddings (N, D)."""
    samples = samples_on(labels, scene.grid)
    vectors = scene.at(samples.rows, samples.cols)
    known = np.isfinite(vectors).all(axis=1)
    found = samples._replace(
        rows=samples.rows[known], cols=samples.cols[known], values=samples.values[known]
    )
    return found, vectors[known]


def _outside(scenes: Sequence[Embeddings], samples: Sequence[Samples]) -> npt.NDArray[np.bool_]:
    """Return for each point of the labels whether it lies on no patch with data."""
    used = [
        np.isin(found.points, found.rows * scene.grid.width + found.cols)
        for scene, found in zip(scenes, samples, strict=True)
    ]
    return ~np.any(used, axis=0)


def _notes(
    fitting: Fitting,
    counts: Mapping[str, int],
    samples: Sequence[Samples],
    outside: npt.NDArray[np.bool_],
    accuracy: Mapping[str, Accuracy],
) -> tuple[str, ...]:
    notes = []
    if not accuracy:
        notes.append(
            f'All labels lie in one block of {fitting.block:g} km, so cross-validation is not '
            'possible; give a smaller --block_km, or labels that are further apart.'
        )
    if not fitting.files:
        notes.append(
            'The baseline of band statistics needs the rasters of the scene: give --scene '
            'SENSOR=FILE.'
        )
    if outside.any():
        notes.append(
            f'{outside.sum()} of {len(outside)} points lie on no patch with data and are left out.'
        )
    if conflicts := sum(found.conflicts for found in samples):
        notes.append(
            f'{counted(conflicts, "patch", "patches")} with points of several classes: the '
            'majority is used.'
        )
    if absent := [name for name, count in counts.items() if not count]:
        notes.append(f'Classes without a label on a scene are not mapped: {", ".join(absent)}.')
    return tuple(notes)


def _save(output: Path, head: Head, report: Classified, fitting: Fitting) -> Classified:
    """Write the head and the report."""
    files = [output / _HEAD, output / _REPORT]
    head.save(files[0])
    entry: dict[str, Any] = {
        'geofm': __version__,
        'method': head.method,
        'labels': fitting.labels.name,
        'block_km': fitting.block,
        'model': head.model,
        'weights_sha256': head.weights_sha256,
        'samples': dict(report.counts),
        'notes': list(report.notes),
        'accuracy': {name: value.as_json() for name, value in report.accuracy.items()},
    }
    write_atomically(files[1], json.dumps(entry, indent=1, ensure_ascii=False) + '\n')
    for name, value in report.accuracy.items():
        path = output / f'classify_{name.replace(" ", "_")}.png'
        with atomic_file(path) as part:
            value.figure(f'Cross-validation, {name}').savefig(part, dpi=150)
        files.append(path)
    return replace(report, files=tuple(files))


def _path(scene: Embeddings, output: Path, product: str) -> Path:
    return output / f'{scene.stem}_{product}.tif'


def _write(scene: Embeddings, head: Head, output: Path, command: str) -> list[Path]:
    """Write the maps of a scene."""
    grid, count = scene.grid, len(head.classes)
    maps = np.full((count, *grid.shape), np.nan, np.float32)
    for batch in scene.batches():
        maps[:, batch.rows, batch.cols] = head.probabilities(batch.vectors).T
    known = np.isfinite(maps).all(axis=0)
    best = np.where(known, np.nan_to_num(maps).argmax(axis=0), 0)
    classes = np.where(known, head.classes[best].astype(np.float32), np.nan)[None]
    with np.errstate(divide='ignore', invalid='ignore'):
        parts = np.where(maps > 0, maps * np.log(maps), 0).sum(axis=0)
    entropy = np.where(known, (-parts / math.log(count)).clip(0, 1), np.nan)[None]
    names = [head.legend.name(int(value)) for value in head.classes]
    tags = {
        'TIFFTAG_SOFTWARE': f'geofm {__version__}',
        'model': head.model,
        'weights_sha256': head.weights_sha256,
        'method': head.method,
        'embeddings': scene.path.name,
        'command': command,
        **head.legend.tags(),
    }
    colors = Encoding('uint8', NO_CLASS, colors=head.legend.colors)
    outputs: list[tuple[str, list[str], npt.NDArray[Any], dict[str, str], Encoding | None]] = [
        ('classes', ['class'], classes, {}, colors),
        ('class_probability', names, maps, {'unit': 'probability'}, None),
        ('uncertainty', ['entropy'], entropy, {'unit': 'entropy, 1 for equal probabilities'}, None),
    ]
    files = []
    for name, bands, values, more, encoding in outputs:
        path = _path(scene, output, name)
        strips = [Strip(values.astype(np.float32), known)]
        write_pixels(path, grid, 1, bands, strips, tags={**tags, **more}, encoding=encoding)
        files.append(path)
    picture = output / f'{scene.stem}_picture.png'
    draw_classes(files[0], picture, head.legend)
    return [*files, picture]
