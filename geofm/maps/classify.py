"""A map of classes from embeddings and a few labels, without training a network."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyproj
import rasterio
import torch
from rich.progress import Progress
from sklearn.model_selection import GroupKFold

from geofm import __version__, lonlat
from geofm.atomic import atomic_file
from geofm.datasets.archive.blocks import Blocks
from geofm.datasets.labels import LabelSource, open_labels
from geofm.datasets.labels.vector import VectorLabels
from geofm.evaluation.accuracy import Accuracy, Confusions
from geofm.evaluation.encoders import band_statistics_encoder
from geofm.grid import Grid
from geofm.legend import NO_CLASS, Legend
from geofm.locking import locked_folder
from geofm.maps.embeddings import Batch, EmbeddingTable, read_batches
from geofm.maps.heads import Head, Method
from geofm.maps.scene import Scene
from geofm.maps.windows import Floats, Strip
from geofm.maps.writer import Encoding, patch_grid, write_pixels
from geofm.rasters import open_raster
from geofm.sensors import bands_of

#: Most folds of the cross-validation.
FOLDS = 5

#: End of the names of files of embeddings.
_END = '_embedding'

_TIF_VALUES = 2**24


@dataclass(frozen=True)
class Embeddings:
    """A file of embeddings of a scene.

    Attributes:
        path: The file.
        table: Patch grid, scales and tags.
        dimensions: Length of an embedding.
    """

    path: Path
    table: EmbeddingTable
    dimensions: int

    @classmethod
    def open(cls, path: Path) -> Self:
        """Look at a file.

        Args:
            path: ``*_embedding.parquet`` or ``*_embedding.tif`` that ``geofm embed`` wrote.

        Returns:
            What it says of itself.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no embeddings, or does not say of which model.
        """
        if path.suffix.lower() == '.tif':
            with open_raster(path) as src:
                scales = None if set(src.scales) == {1.0} else tuple(src.scales)
                found = cls(path, EmbeddingTable(Grid.of(src), scales, src.tags()), src.count)
        else:
            table = EmbeddingTable.read(path)
            batch = next(read_batches(path, table), None)
            if batch is None:
                raise ValueError(f'{path}: no patch has an embedding')
            found = cls(path, table, batch.vectors.shape[1])
        if 'weights_sha256' not in found.table.tags:
            raise ValueError(
                f'{path}: does not say of which model its embeddings are; give a '
                '*_embedding.parquet or .tif that `geofm embed` wrote'
            )
        return found

    @property
    def stem(self) -> str:
        """Name of the scene."""
        return self.path.stem.removesuffix(_END)

    @property
    def grid(self) -> Grid:
        """Grid of the patches."""
        return self.table.grid

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights of the model."""
        return self.table.tags['weights_sha256']

    def batches(self) -> Iterator[Batch]:
        """Embeddings of the patches with data, never all at once."""
        if self.path.suffix.lower() == '.tif':
            yield from self._tif_batches()
            return
        height, width = self.grid.shape
        for batch in read_batches(self.path, self.table):
            inside = (batch.rows >= 0) & (batch.rows < height)
            inside &= (batch.cols >= 0) & (batch.cols < width)
            if not inside.all():
                raise ValueError(f'{self.path}: damaged: patches beyond its grid')
            known = np.isfinite(batch.vectors).all(axis=1)
            rows, cols, vectors = batch
            yield batch if known.all() else Batch(rows[known], cols[known], vectors[known])

    def at(self, rows: npt.NDArray[np.intp], cols: npt.NDArray[np.intp]) -> Floats:
        """Embeddings at positions, NaN where there is none.

        Args:
            rows: Rows on the patch grid (N,).
            cols: Columns (N,).

        Returns:
            Embeddings (N, D).
        """
        where = np.full(self.grid.shape, -1, np.intp)
        where[rows, cols] = np.arange(len(rows))
        found = np.full((len(rows), self.dimensions), np.nan, np.float32)
        for batch in self.batches():
            index = where[batch.rows, batch.cols]
            found[index[index >= 0]] = batch.vectors[index >= 0]
        return found

    def _tif_batches(self) -> Iterator[Batch]:
        with open_raster(self.path) as src:
            step = max(1, _TIF_VALUES // (src.count * src.width))
            for top in range(0, src.height, step):
                height = min(step, src.height - top)
                window = rasterio.windows.Window(0, top, src.width, height)
                values = src.read(window=window).astype(np.float32)
                known = np.isfinite(values).all(axis=0)
                if src.nodata is not None and not math.isnan(src.nodata):
                    known &= (values != src.nodata).any(axis=0)
                if self.table.scales is not None:
                    values = values * np.array(self.table.scales, np.float32)[:, None, None]
                rows, cols = known.nonzero()
                yield Batch(rows + top, cols, values[:, rows, cols].T)


class Samples(NamedTuple):
    """Patches with a label.

    Attributes:
        rows: Rows on the patch grid (N,).
        cols: Columns (N,).
        values: Values of classes (N,).
        conflicts: Patches that hold points of several classes.
    """

    rows: npt.NDArray[np.intp]
    cols: npt.NDArray[np.intp]
    values: npt.NDArray[np.uint8]
    conflicts: int


def samples_on(labels: LabelSource, grid: Grid) -> Samples:
    """Patches that hold a point, or whose centre lies in a polygon.

    Args:
        labels: The labels.
        grid: Grid of the patches.

    Returns:
        The patches. Where points of several classes lie in one, the class with the most points
        counts; of as many, that of the lowest value. Points go before polygons.
    """
    classes = labels.classes_on(grid)
    conflicts = 0
    if isinstance(labels, VectorLabels):
        rows, cols, values = _points_on(labels, grid)
        flat = (rows * grid.width + cols).astype(np.int64)
        patches, which = np.unique(flat, return_inverse=True)
        counts = np.zeros((len(patches), NO_CLASS), np.int64)
        np.add.at(counts, (which, values), 1)
        conflicts = int(((counts > 0).sum(axis=1) > 1).sum())
        np.put(classes, patches, counts.argmax(axis=1).astype(np.uint8))
    rows, cols = (classes != NO_CLASS).nonzero()
    return Samples(rows, cols, classes[rows, cols], conflicts)


def _points_on(
    labels: VectorLabels, grid: Grid
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.uint8]]:
    """Row, column and class of each point that lies on a grid."""
    geometry = labels.frame.geometry
    points = geometry[geometry.geom_type.isin(['Point', 'MultiPoint'])]
    points = points.to_crs(pyproj.CRS.from_user_input(grid.crs)).explode(index_parts=False)
    values = labels.values[points.index.to_numpy(np.intp)]
    places = grid.pixel_of(points.x.to_numpy(), points.y.to_numpy())
    rows, cols = (np.floor(np.nan_to_num(p, nan=-1, posinf=-1, neginf=-1)) for p in places)
    inside = (rows >= 0) & (rows < grid.height) & (cols >= 0) & (cols < grid.width)
    return rows[inside].astype(np.intp), cols[inside].astype(np.intp), values[inside]


def blocks_of(
    grid: Grid, rows: npt.NDArray[np.intp], cols: npt.NDArray[np.intp], size: float
) -> npt.NDArray[np.intp]:
    """Block of ground of patches, the same for all scenes.

    Args:
        grid: Grid of the patches.
        rows: Rows (N,).
        cols: Columns (N,).
        size: Side of a block in km.

    Returns:
        Code of the block of each patch's centre (N, 1), as of
        :class:`geofm.datasets.archive.blocks.Blocks`.
    """
    places = grid.transform @ (cols + 0.5, rows + 0.5)
    lon, lat = lonlat.transform_to_lonlat(grid, *places).T
    lon = lonlat.wrap(lon)
    codes, starts = Blocks(size).touched(np.stack([lon, lat, lon, lat], axis=1))
    return codes[starts, None].astype(np.intp)


def folds_of(blocks: npt.NDArray[np.intp]) -> list[tuple[npt.NDArray[np.intp], ...]]:
    """Folds whose training and test samples lie in different blocks.

    Args:
        blocks: Block of each sample (N, 1).

    Returns:
        Indices to train on and to test on, for each fold; none if all lie in one block.
    """
    _, groups = np.unique(blocks, axis=0, return_inverse=True)
    groups = groups.reshape(-1)
    count = len(np.unique(groups))
    if count < 2:
        return []
    return list(GroupKFold(min(FOLDS, count)).split(groups, groups=groups))


def cross_validate(
    method: Method,
    vectors: Floats,
    values: npt.NDArray[np.uint8],
    blocks: npt.NDArray[np.intp],
    legend: Legend,
    size: float,
    seed: int = 0,
) -> Accuracy | None:
    """Classify the samples of each fold by those of the others.

    Args:
        method: How to classify.
        vectors: Embeddings or other features (N, D).
        values: Class of each (N,).
        blocks: Block of each (N, 1).
        legend: The classes.
        size: Side of a block in km, for the report.
        seed: Seed of the intervals.

    Returns:
        The accuracy over all samples; None if they lie in one block.
    """
    confusions = Confusions(legend, unit='patches', side=f'{size:g} km')
    folds = folds_of(blocks)
    for train, test in folds:
        known = np.unique(values[train])
        if len(known) < 2:
            guess = np.full(len(test), known[0], np.uint8)
        else:
            guess = Head.fit(method, vectors[train], values[train], legend).predict(vectors[test])
        confusions.add_samples(guess, values[test], blocks[test])
    return confusions.accuracy(seed=seed) if folds else None


def band_statistics(
    files: Mapping[str, Path],
    grid: Grid,
    rows: npt.NDArray[np.intp],
    cols: npt.NDArray[np.intp],
    names: Mapping[str, Sequence[str]] | None = None,
    reference: str | None = None,
) -> Floats:
    """Mean and standard deviation of each band over patches, the baseline of embeddings.

    Args:
        files: Rasters of the scene by key of their sensor.
        grid: Grid of the patches.
        rows: Rows (N,).
        cols: Columns (N,).
        names: Names of the bands of files that do not say.
        reference: Sensor whose grid the patches are on.

    Returns:
        Statistics (N, 2 x bands); 0 where a patch has no valid pixel.

    Raises:
        ValueError: If the patches are not those of the rasters.
    """
    bands = bands_of([*files])
    found = np.zeros((len(rows), 2 * len(bands)), np.float32)
    with Scene(bands, files=files, names=names, missing='mean', reference=reference) as scene:
        size = round(grid.res[0] / scene.grid.res[0])
        own = patch_grid(scene.grid, max(1, size))
        if own.shape != grid.shape or own.offset_in(grid) != (0, 0):
            raise ValueError(
                f'{scene.path}: its pixels are not those of the patches; give the rasters that '
                '`geofm embed` took, and its --reference_sensor'
            )
        for row in np.unique(rows):
            here = np.flatnonzero(rows == row)
            first, last = cols[here].min(), cols[here].max() + 1
            part = scene.read(int(row) * size, int(first) * size, size, int(last - first) * size)
            image = torch.where(part['valid'], part['image'], 0)
            lefts = ((cols[here] - first) * size).tolist()
            patches = {
                key: torch.stack([values[..., left : left + size] for left in lefts])
                for key, values in (('image', image), ('valid', part['valid']))
            }
            found[here] = band_statistics_encoder(patches).numpy()
    return found


@dataclass(frozen=True)
class Classified:
    """What was made.

    Attributes:
        files: The files written.
        accuracy: Cross-validated accuracy by what the features are; empty with a head that was
            fitted before, or if all samples lie in one block.
        counts: Number of samples of each class, by its name.
        notes: What a reader of the figures should know.
    """

    files: tuple[Path, ...]
    accuracy: Mapping[str, Accuracy]
    counts: Mapping[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Fitting:
    """Labels, and how to learn from them.

    Attributes:
        labels: File of labels.
        column: Column that holds the class.
        method: How to classify.
        block: Side in km of the blocks of the cross-validation.
        files: Rasters of the scene by sensor, for the baseline.
        names: Names of the bands of files that do not say.
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
        paths: Files of embeddings, one a scene.
        output: Folder to write to: for each scene ``*_classes.tif``, ``*_class_probability.tif``
            and ``*_uncertainty.tif``; with labels also ``head.safetensors`` and the report of the
            cross-validation.
        fitting: Labels to learn from, or a head that was fitted before.
        command: What is written in the files' tags as the command.

    Returns:
        What was made.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file cannot be used, embeddings are of different models, or the labels do
            not suffice.
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
        raise ValueError('no embeddings: give *_embedding.parquet that `geofm embed` wrote')
    first = scenes[0]
    stems: dict[str, Path] = {}
    for scene in scenes:
        if (scene.weights_sha256, scene.dimensions) != (first.weights_sha256, first.dimensions):
            raise ValueError(
                f'{first.path} and {scene.path}: embeddings of two models; make both with one '
                'checkpoint'
            )
        if scene.stem in stems:
            raise ValueError(
                f'{stems[scene.stem]} and {scene.path}: both would be written as {scene.stem}_*; '
                'rename one, or classify it with --head into another folder'
            )
        stems[scene.stem] = scene.path
    return scenes


def _fit(scenes: Sequence[Embeddings], output: Path, fitting: Fitting) -> tuple[Head, Classified]:
    if not (math.isfinite(fitting.block) and fitting.block > 0):
        raise ValueError(f'block {fitting.block:g}: the side of a block is a positive number of km')
    if fitting.files and len(scenes) > 1:
        raise ValueError(
            'the baseline takes the rasters of one scene; give one file of embeddings, or leave '
            '--scene out'
        )
    labels = open_labels(fitting.labels, column=fitting.column)
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
    notes = _notes(fitting, counts, sum(part[0].conflicts for part in parts), accuracy)
    return head, _save(output, head, Classified((), accuracy, counts, notes), fitting)


def _samples(scene: Embeddings, labels: LabelSource) -> tuple[Samples, Floats]:
    """Labelled patches that have an embedding, and these (N, D)."""
    samples = samples_on(labels, scene.grid)
    vectors = scene.at(samples.rows, samples.cols)
    known = np.isfinite(vectors).all(axis=1)
    rows, cols, values, conflicts = samples
    return Samples(rows[known], cols[known], values[known], conflicts), vectors[known]


def _notes(
    fitting: Fitting, counts: Mapping[str, int], conflicts: int, accuracy: Mapping[str, Accuracy]
) -> tuple[str, ...]:
    notes = []
    if not accuracy:
        notes.append(
            f'All labels lie in one block of {fitting.block:g} km, so there is no '
            'cross-validation; give a smaller --block, or labels further apart.'
        )
    if not fitting.files:
        notes.append(
            'The baseline of band statistics needs the rasters of the scene: give --scene '
            'SENSOR=FILE.'
        )
    if conflicts:
        notes.append(f'{conflicts} patches hold points of several classes; the majority counts.')
    if absent := [name for name, count in counts.items() if not count]:
        notes.append(f'No label of {", ".join(absent)} lies on a scene: not in the map.')
    return tuple(notes)


def _save(output: Path, head: Head, report: Classified, fitting: Fitting) -> Classified:
    """Write the head and the report."""
    files = [output / 'head.safetensors', output / 'classify.json']
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
    with atomic_file(files[1]) as part:
        part.write_text(json.dumps(entry, indent=1, ensure_ascii=False) + '\n')
    for name, value in report.accuracy.items():
        path = output / f'classify_{name.replace(" ", "_")}.png'
        with atomic_file(path) as part:
            value.figure(f'Cross-validation, {name}').savefig(part, dpi=150)
        files.append(path)
    return replace(report, files=tuple(files))


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
        ('uncertainty', ['entropy'], entropy, {'unit': 'entropy, 1 is all alike'}, None),
    ]
    files = []
    for name, bands, values, more, encoding in outputs:
        path = output / f'{scene.stem}_{name}.tif'
        strips = [Strip(values.astype(np.float32), known)]
        write_pixels(path, grid, 1, bands, strips, tags={**tags, **more}, encoding=encoding)
        files.append(path)
    return files
