"""Predictions of a fine-tuned task for scenes of any size: maps of classes or of numbers."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import rasterio
import torch
from rich.progress import Progress
from torch import Tensor

from geofm import __version__
from geofm.atomic import check_not_overwritten
from geofm.datasets.memory import release_memory
from geofm.legend import NO_CLASS
from geofm.locking import locked_folder
from geofm.maps.make.class_products import draw_classes, write_polygons
from geofm.maps.make.survey import Survey, open_survey, weights_sha256
from geofm.maps.make.tables import ALONE, Part, TableRun, run_table, show_progress
from geofm.maps.make.windows import Floats, Strip, Tiling
from geofm.maps.make.writer import Encoding, patch_grid, write_patches
from geofm.maps.scene import CACHE_BYTES, Imagery, Missing, Scene, TableScenes, option
from geofm.printing import warn
from geofm.sensors import SENSORS
from geofm.tasks import FineTuned, check_model, logits, without_sensors

#: Products of a task of classes. A regression has one product, its values.
ClassProduct = Literal['classes', 'probabilities', 'entropy', 'polygons', 'picture']

#: Fractions are stored in 8 bits as 0 to 254.
_STEPS = 254

#: Suffixes of the products that are made from the raster of classes.
_SUFFIXES = {'polygons': '.parquet', 'picture': '.png'}

#: Number of rows of logits that are processed at once.
_ROWS = 32


@dataclass(frozen=True)
class PredictOptions:
    """How a scene is predicted.

    Attributes:
        window: Side of a window in pixels. The image size that the task was trained with is best.
        overlap: Minimum fraction of a window that overlaps with the next, in [0, 1).
        batch_size: Number of windows per forward pass.
        missing_bands: Values for a band that a raster lacks: its 'mean' or 'zero'. None: a missing
            band is an error.
        simplify: Tolerance of the simplification of polygons in units of the scene's CRS.
        missing_sensors: Whether a scene may lack sensors that the task was fine-tuned with.
    """

    window: int = 224
    overlap: float = 0.5
    batch_size: int = 4
    missing_bands: Missing | None = None
    simplify: float = 0.0
    missing_sensors: bool = False


class Predictor:
    """Predictions of a fine-tuned task for the windows of a scene.

    Attributes:
        scene: The scene.
        kept: Band names by kind of raster, see :func:`kept_of`.
    """

    def __init__(self, task: FineTuned, scene: Imagery, products: Sequence[ClassProduct]) -> None:
        """Initialize a new Predictor instance.

        Args:
            task: The task.
            scene: The scene.
            products: Products to make.
        """
        self.task = task
        self.scene = scene
        self.normalize = task.statistics.normalize(scene.bands)
        self.device = next(task.task.parameters()).device
        self.kept = kept_of(task, products)

    @property
    def blended(self) -> int:
        """Number of logits per pixel, which are averaged over overlapping windows."""
        return self.task.outputs

    def values(self, samples: Mapping[str, Tensor]) -> Floats:
        """Compute the logits, or the values of a regression, of windows.

        Args:
            samples: Collated samples of :meth:`Scene.read`.

        Returns:
            Logits or values of shape (windows, K, rows, columns).

        Raises:
            ValueError: If a number is not finite.
        """
        with torch.inference_mode():
            batch = {key: value.to(self.device) for key, value in samples.items()}
            image = self.normalize(batch)['image']
            # The mean of a band is 0 after normalisation.
            image[:, self.scene.at_mean] = 0
            found = logits(self.task, image)
        if not found.isfinite().all():
            raise ValueError(
                'predictions are not finite: the weights diverged or are damaged; use an earlier '
                'checkpoint'
            )
        return found.cpu().numpy()

    def finish(self, values: Floats) -> npt.NDArray[Any]:
        """Convert averaged logits to the numbers that are kept.

        Args:
            values: Logits or values of shape (K, rows, columns); NaN where there is no data.

        Returns:
            The float32 values of a regression. Otherwise uint8, in the order of :attr:`kept`:
            values of classes, and probabilities and entropy times 254. Entropy is 1 where all
            classes are equally probable. :data:`~geofm.legend.NO_CLASS` where there is no data.
        """
        if self.task.kind == 'regression':
            return values
        # A few rows at a time, because each step makes another copy of the logits.
        parts = range(0, values.shape[1], _ROWS)
        return np.concatenate([self._kept(values[:, i : i + _ROWS]) for i in parts], axis=1)

    def _kept(self, values: Floats) -> npt.NDArray[np.uint8]:
        """Convert some rows of averaged logits."""
        known = np.isfinite(values).all(axis=0)
        scores = torch.from_numpy(np.where(known, values, 0))
        parts = []
        if 'classes' in self.kept:
            parts.append(scores.argmax(dim=0).numpy()[None].astype(np.float32))
        if self.kept.keys() - {'classes'}:
            probs = (scores.sigmoid() if self.task.several else scores.softmax(dim=0)).numpy()
            if 'probabilities' in self.kept:
                parts.append(np.rint(probs * _STEPS))
            if 'entropy' in self.kept:
                entropy = -(probs * np.log(np.maximum(probs, 1e-12))).sum(axis=0)
                parts.append(np.rint(entropy / math.log(len(probs)) * _STEPS)[None])
        kept = np.concatenate(parts)
        return np.where(known, kept, NO_CLASS).astype(np.uint8)


def kept_of(task: FineTuned, products: Sequence[ClassProduct]) -> dict[str, tuple[str, ...]]:
    """Return the bands of the rasters that are stored to make the products.

    Args:
        task: The task.
        products: Products to make.

    Returns:
        Band names by kind of raster: 'values' of a regression; 'classes', 'probabilities' and
        'entropy' of other tasks.
    """
    names = task.legend.names
    if task.kind == 'regression':
        return {'values': names}
    kept: dict[str, tuple[str, ...]] = {}
    if not {'classes', 'polygons', 'picture'}.isdisjoint(products):
        kept['classes'] = ('class',)
    if 'probabilities' in products:
        kept['probabilities'] = tuple(f'probability of {name}' for name in names)
    if 'entropy' in products:
        kept['entropy'] = ('entropy',)
    return kept


@dataclass(frozen=True)
class Prediction:
    """Task with the products and options that are used for any number of scenes.

    Attributes:
        task: The task.
        products: Products to make, in the order of :data:`ClassProduct`; empty for a regression.
        options: How scenes are predicted.
        command: Command to write to the tags of the files.
        weights: Hash of the task's weights.
        keep: Files that must not be overwritten, such as a reference.
    """

    task: FineTuned
    products: tuple[ClassProduct, ...]
    options: PredictOptions
    command: str
    weights: str
    keep: tuple[Path, ...] = ()

    @classmethod
    def prepare(
        cls,
        task: FineTuned,
        products: Sequence[ClassProduct],
        options: PredictOptions | None = None,
        device: torch.device | str | None = None,
        command: str = 'geofm.maps.make.predict_files',
    ) -> Self:
        """Check the products and options, and move the task to a device.

        Args:
            task: The task.
            products: Products to make.
            options: How scenes are predicted.
            device: Device to run on. Default: the device of the task.
            command: Command to write to the tags of the files.

        Returns:
            The prediction, to be applied to scenes.

        Raises:
            ValueError: If a product is unknown, an option is out of range, or the task does not
                take windows of this size.
        """
        options = options or PredictOptions()
        if options.batch_size < 1:
            raise ValueError(f'batch_size={options.batch_size} is not positive')
        if options.window < 1:
            raise ValueError(f'window={options.window} is not positive')
        if not (math.isfinite(options.simplify) and options.simplify >= 0):
            raise ValueError(f'simplify={options.simplify:g} is not a tolerance of 0 or more')
        chosen = _choose(task, products)
        if device is not None:
            task.task.to(device)
        check_model(task, options.window)
        return cls(task, chosen, options, command, weights_sha256(task.task))

    def run(self, scene: Imagery, output: Path, progress: Progress) -> dict[str, Path]:
        """Map a scene, or resume mapping it.

        Args:
            scene: The scene.
            output: Folder to write to.
            progress: Progress bars to add to.

        Returns:
            The files by product.

        Raises:
            FileExistsError: If one of the files in :attr:`keep` would be overwritten.
            ValueError: If the scene lacks a sensor or has no data.
        """
        check_not_overwritten(self.keep, self.files(scene, output).values())
        self._report_sensors(scene)
        scene.check_units()
        predictor = Predictor(self.task, scene, self.products)
        with without_sensors(self.task, scene.absent):
            survey = self._open(predictor, output)
            survey.run(predictor, self.options.batch_size, progress)
        if survey.is_empty():
            survey.remove()
            raise ValueError(f'{scene.path}: no pixel has data in every band')
        made = self.files(scene, output)
        _write(self, predictor, survey, made)
        survey.remove()
        return made

    def files(self, scene: Imagery, output: Path) -> dict[str, Path]:
        """Return the paths of the products of a scene.

        Args:
            scene: The scene.
            output: Folder to write to.

        Returns:
            The files by product.
        """
        kinds = dict.fromkeys(kept_of(self.task, self.products), '.tif')
        kinds |= {p: _SUFFIXES[p] for p in self.products if p in _SUFFIXES}
        return {kind: output / f'{scene.stem}_{kind}{suffix}' for kind, suffix in kinds.items()}

    def manifest(self, scene: Imagery) -> dict[str, Any]:
        """Return everything that the predictions for a scene depend on.

        Args:
            scene: The scene.

        Returns:
            Plain data for JSON.
        """
        task, options = self.task, self.options
        return {
            'geofm': __version__,
            'task': f'{task.kind} {task.name}',
            'weights_sha256': self.weights,
            'window': options.window,
            'overlap': options.overlap,
            'kept': kept_of(task, self.products),
            'rasters': scene.describe(),
            'statistics': task.statistics.entry(),
            'missing_bands': options.missing_bands,
        }

    def tags(self, scene: Imagery) -> dict[str, str]:
        """Return the tags of the files of a scene, which say how they were made.

        Args:
            scene: The scene.

        Returns:
            The tags.
        """
        task, options = self.task, self.options
        return {
            'TIFFTAG_SOFTWARE': f'geofm {__version__}',
            'task': f'{task.kind} {task.name}',
            'weights_sha256': self.weights,
            'input_statistics': json.dumps(task.statistics.entry()),
            'window': str(options.window),
            'overlap': str(0 if task.kind == 'classification' else options.overlap),
            'command': self.command,
            **scene.tags(),
        }

    def _report_sensors(self, scene: Imagery) -> None:
        """Warn of missing sensors, or raise an error if they are not allowed."""
        for key in scene.absent:
            title = SENSORS[key].title
            if not self.options.missing_sensors:
                raise ValueError(
                    f'the task was fine-tuned with {title} ({option(key)}): give its raster too, '
                    'or --missing_sensors to predict without it'
                )
            warn(
                f'predicted without {title}: accuracy may be lower, unless the task was fine-tuned '
                'with missing sensors'
            )

    def _open(self, predictor: Predictor, output: Path) -> Survey:
        """Open the work folder."""
        task, scene, window = self.task, predictor.scene, self.options.window
        manifest = self.manifest(scene)
        digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:8]
        folder = output / f'.{scene.stem}.{digest}.work'
        if task.kind == 'classification':
            tiling = Tiling.cover(scene.grid.shape, window, window, 0)
        else:
            # The model takes multiples of a size, so the last windows may reach beyond the scene.
            height, width = (math.ceil(s / task.multiple) * task.multiple for s in scene.grid.shape)
            tiling = Tiling.cover((height, width), 1, window, self.options.overlap)
        return open_survey(folder, tiling, predictor.kept, manifest)


def predict_files(
    prediction: Prediction,
    files: Mapping[str, Path],
    output: Path,
    reference: str | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Path]:
    """Map the predictions of a fine-tuned task for a scene of any size.

    The scene is read in overlapping windows, whose logits are averaged with raised-cosine weights.
    Memory does not grow with the height of the scene. Finished rows of windows are kept in a work
    folder beside the products until the products are complete, so that the same call resumes after
    a crash.

    - ``classes``: Cloud-Optimised GeoTIFF with the pixels of the scene (for a Classification, one
      pixel per window), a colour table, and the classes in its tags; 255 where a sensor has no
      data.
    - ``probabilities``: one band per class, stored as 0 to 254 with the scale 1/254 in the file.
    - ``entropy``: entropy of the probabilities, 1 where they are equal, stored in the same way.
    - ``polygons``: the classes as GeoParquet.
    - ``picture``: PNG of the classes with a legend.

    A regression has one product, ``values``, in float32.

    Args:
        prediction: The prediction.
        files: Raster of each sensor, by key.
        output: Folder to write to.
        reference: Sensor whose grid is used.
        names: Names of the bands of a file by sensor, for files without band descriptions.

    Returns:
        The files by product.

    Raises:
        ValueError: If a raster of a sensor is missing or cannot be used.
    """
    with (
        locked_folder(output),
        rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES),
        Scene(
            prediction.task.bands,
            names=names,
            missing=prediction.options.missing_bands,
            files=files,
            reference=reference,
        ) as scene,
        show_progress() as progress,
    ):
        return prediction.run(scene, output, progress)


def predict_table(
    prediction: Prediction, scenes: TableScenes, output: Path, part: Part = ALONE
) -> TableRun:
    """Map the predictions of a fine-tuned task for every scene of a table.

    Args:
        prediction: The prediction.
        scenes: The scenes.
        output: Folder that contains the folders of the scenes.
        part: Which of the scenes this process maps.

    Returns:
        The result for the scenes of the part, see :func:`geofm.maps.make.tables.run_table`.
    """

    def made_with(scene: Imagery) -> Mapping[str, Any]:
        check_not_overwritten(
            prediction.keep, prediction.files(scene, output / scene.stem).values()
        )
        return {
            **prediction.manifest(scene),
            'products': prediction.products,
            'simplify': prediction.options.simplify,
            'legend': prediction.task.legend.entry(),
        }

    return run_table(scenes, output, prediction.run, made_with, 'prediction', part)


def _choose(task: FineTuned, products: Sequence[ClassProduct]) -> tuple[ClassProduct, ...]:
    """Return the products to make, in order; none for a regression."""
    if task.kind == 'regression':
        return ()
    every: tuple[ClassProduct, ...] = get_args(ClassProduct)
    if unknown := [p for p in products if p not in every]:
        raise ValueError(f'unknown products {unknown}: choose from {list(every)}')
    if task.several and (wrong := [p for p in products if p != 'probabilities']):
        raise ValueError(
            f'{", ".join(wrong)}: not available for a multi-label task: give --products '
            '[probabilities]'
        )
    if not products:
        raise ValueError(f'no products: choose from {list(every)}')
    return tuple(p for p in every if p in products)


def _write(
    prediction: Prediction, predictor: Predictor, survey: Survey, made: Mapping[str, Path]
) -> None:
    """Write the files of the products."""
    scene, p, products = predictor.scene, survey.tiling.patch_size, prediction.products
    legend, tags = prediction.task.legend, prediction.tags(scene)
    encodings = {
        'classes': Encoding('uint8', NO_CLASS, colors=legend.colors),
        'values': Encoding(),
    }
    patches = patch_grid(scene.grid, p).shape
    for kind, bands in predictor.kept.items():
        fraction = Encoding('uint8', NO_CLASS, [1 / _STEPS] * len(bands))
        encoding = encodings.get(kind, fraction)
        scale = np.float32(_STEPS if encoding is fraction else 1)
        said = {**tags, **(legend.tags() if kind == 'classes' else {})}
        strips = _cut(survey.strips(kind), patches, p, scale)
        write_patches(made[kind], scene.grid, p, bands, strips, said, encoding)
        release_memory()
    if 'polygons' in products:
        write_polygons(made['classes'], made['polygons'], legend, prediction.options.simplify)
    if 'picture' in products:
        draw_classes(made['classes'], made['picture'], legend)


def _cut(
    strips: Iterator[Strip], shape: tuple[int, int], patch_size: int, scale: np.float32
) -> Iterator[Strip]:
    """Crop strips to the scene, and convert 8-bit numbers to values."""
    row = 0
    for strip in strips:
        rows = min(strip.values.shape[1], shape[0] - row)
        if rows <= 0:
            return
        values = strip.values[:, :rows, : shape[1]].astype(np.float32) / scale
        yield Strip(values, strip.valid[: rows * patch_size, : shape[1] * patch_size])
        row += rows
