"""Maps of what a fine-tuned task says of scenes of any size: classes or numbers."""

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
from geofm.legend import NO_CLASS
from geofm.locking import locked_folder
from geofm.maps.make.class_products import draw_classes, write_polygons
from geofm.maps.make.survey import (
    Survey,
    open_survey,
    return_memory,
    weights_sha256,
)
from geofm.maps.make.tables import ALONE, CACHE_BYTES, Part, TableRun, run_table, show_progress
from geofm.maps.make.windows import Floats, Strip, Tiling
from geofm.maps.make.writer import Encoding, patch_grid, write_patches
from geofm.maps.scene import Imagery, Missing, Scene, TableScenes, option
from geofm.printing import warn
from geofm.sensors import SENSORS
from geofm.tasks import FineTuned, check_model, logits, without_sensors

#: What can be made of a task of classes; of a regression there are its values alone.
ClassProduct = Literal['classes', 'probabilities', 'entropy', 'polygons', 'picture']

#: Fractions are kept in 8 bits, 0 to 254.
_STEPS = 254

#: Suffixes of products that are made of the raster of classes.
_SUFFIXES = {'polygons': '.parquet', 'picture': '.png'}

#: Rows of logits that are worked on at once.
_ROWS = 32


@dataclass(frozen=True)
class PredictOptions:
    """How a scene is predicted.

    Attributes:
        window: Side of a window in pixels; best the size that the task was trained with.
        overlap: Least fraction of a window that the next one covers too, in [0, 1).
        batch_size: Windows per forward pass.
        missing_bands: What stands for a band that a raster lacks: its 'mean' or 'zero'; None: an
            error.
        simplify: Tolerance by which polygons are simplified, in units of the scene's CRS.
        missing_sensors: Whether a scene may lack sensors that the task was fine-tuned with.
    """

    window: int = 224
    overlap: float = 0.5
    batch_size: int = 4
    missing_bands: Missing | None = None
    simplify: float = 0.0
    missing_sensors: bool = False


class Predictor:
    """A fine-tuned task and a scene: what the task says of a window.

    Attributes:
        scene: The scene.
        kept: Names of what is kept of each pixel: 'class', 'probability of ...', 'entropy'; or
            the outputs of a regression.
    """

    def __init__(self, task: FineTuned, scene: Imagery, products: Sequence[ClassProduct]) -> None:
        """Initialize a new Predictor instance.

        Args:
            task: The task.
            scene: The scene.
            products: What is to be made.
        """
        self.task = task
        self.scene = scene
        self.normalize = task.statistics.normalize(scene.bands)
        self.device = next(task.task.parameters()).device
        self.kept = kept_of(task, products)

    @property
    def blended(self) -> int:
        """Logits are averaged over overlapping windows, before anything else."""
        return self.task.outputs

    def values(self, samples: Mapping[str, Tensor]) -> Floats:
        """Logits or numbers of windows.

        Args:
            samples: Collated samples of :meth:`Scene.read`.

        Returns:
            Shape (windows, K, rows, columns).

        Raises:
            ValueError: If one is not finite.
        """
        with torch.inference_mode():
            batch = {key: value.to(self.device) for key, value in samples.items()}
            image = self.normalize(batch)['image']
            # Normalised, the mean of a band is 0.
            image[:, self.scene.at_mean] = 0
            found = logits(self.task, image)
        if not found.isfinite().all():
            raise ValueError(
                'what the task says of the scene is not finite: its weights diverged or are '
                'damaged; take an earlier checkpoint'
            )
        return found.cpu().numpy()

    def finish(self, values: Floats) -> npt.NDArray[Any]:
        """What is kept of averaged logits or numbers.

        Args:
            values: Shape (K, rows, columns), NaN where there is no data.

        Returns:
            float32 for a regression. Otherwise uint8 in the order of :attr:`kept`: values of
            classes; probabilities and entropy, which is 1 where all classes are equally probable,
            times 254. :data:`~geofm.legend.NO_CLASS` where there is no data.
        """
        if self.task.kind == 'regression':
            return values
        # Part by part, since each step holds another copy of the logits.
        parts = range(0, values.shape[1], _ROWS)
        return np.concatenate([self._kept(values[:, i : i + _ROWS]) for i in parts], axis=1)

    def _kept(self, values: Floats) -> npt.NDArray[np.uint8]:
        """What is kept of some rows of averaged logits."""
        known = np.isfinite(values).all(axis=0)
        scores = torch.from_numpy(np.where(known, values, 0))
        parts = []
        if 'classes' in self.kept:
            parts.append(scores.argmax(dim=0).numpy()[None].astype(np.float32))
        if self.kept.keys() - {'classes'}:
            chances = (scores.sigmoid() if self.task.several else scores.softmax(dim=0)).numpy()
            if 'probabilities' in self.kept:
                parts.append(np.rint(chances * _STEPS))
            if 'entropy' in self.kept:
                information = -(chances * np.log(np.maximum(chances, 1e-12))).sum(axis=0)
                parts.append(np.rint(information / math.log(len(chances)) * _STEPS)[None])
        kept = np.concatenate(parts)
        return np.where(known, kept, NO_CLASS).astype(np.uint8)


def kept_of(task: FineTuned, products: Sequence[ClassProduct]) -> dict[str, tuple[str, ...]]:
    """What is kept of each pixel.

    Args:
        task: The task.
        products: What is to be made.

    Returns:
        Names of bands by kind of raster: 'values', 'classes', 'probabilities', 'entropy'.
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
    """A task and what is to be made with it of any number of scenes.

    Attributes:
        task: The task.
        products: What to make, in the order of :data:`ClassProduct`; none of a regression.
        options: How.
        command: How to name the call in the tags of the files.
        weights: Hash of the task's weights.
        keep: Files that must not be written over, such as a reference.
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
        command: str = 'geofm.maps.predict_scene',
    ) -> Self:
        """Check all that does not depend on a scene.

        Args:
            task: The task.
            products: What to make.
            options: How.
            device: Where to compute; by default where the task is.
            command: How to name the call in the tags of the files.

        Returns:
            What to apply to scenes.

        Raises:
            ValueError: If a product or an option is none, or the task does not take such windows.
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
        """Map a scene, or resume it.

        Args:
            scene: The scene.
            output: Folder to write to.
            progress: Where to show how far it is.

        Returns:
            The files by product.

        Raises:
            FileExistsError: If a file to keep would be overwritten.
            ValueError: If it lacks a sensor, or no pixel of it holds data.
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
            raise ValueError(f'{scene.path}: no pixel holds data in every band')
        made = self.files(scene, output)
        _write(self, predictor, survey, made)
        survey.remove()
        return made

    def files(self, scene: Imagery, output: Path) -> dict[str, Path]:
        """Names of the files that are made of a scene.

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
        """All that what is kept of each pixel of a scene depends on.

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
        """What the files of a scene say of how they were made.

        Args:
            scene: The scene.

        Returns:
            Tags.
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
        """Refuse a scene that lacks sensors, or warn of them."""
        for key in scene.absent:
            title = SENSORS[key].title
            if not self.options.missing_sensors:
                raise ValueError(
                    f'the task was fine-tuned with {title} ({option(key)}): give its raster too, '
                    'or --missing_sensors to predict without'
                )
            warn(
                f'predicted without {title}: unless the task was fine-tuned so too, its accuracy '
                'may be lower'
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
            # Windows of a size that the model takes; the last ones may reach beyond the scene.
            height, width = (math.ceil(s / task.multiple) * task.multiple for s in scene.grid.shape)
            tiling = Tiling.cover((height, width), 1, window, self.options.overlap)
        return open_survey(folder, tiling, predictor.kept, manifest)


def predict_scene(
    task: FineTuned,
    files: Mapping[str, Path],
    output: Path,
    products: Sequence[ClassProduct] = ('classes', 'picture'),
    options: PredictOptions | None = None,
    *,
    reference: str | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    device: torch.device | str | None = None,
    command: str = 'geofm.maps.predict_scene',
) -> dict[str, Path]:
    """Map what a fine-tuned task says of a scene of any size.

    The scene is read in overlapping windows. Their logits are averaged with raised-cosine weights
    before the class is chosen. Memory does not grow with the height of the scene. Finished rows of
    windows are kept in a work folder beside the products until these are whole, so the same call
    after a crash resumes there.

    - ``classes``: Cloud-Optimised GeoTIFF on the pixels of the scene (of a Classification: one
      pixel per window) with a colour table and the classes in its tags; 255 where a sensor has no
      data.
    - ``probabilities``: a band per class; numbers of 0 to 254, with the scale 1/254 in the file.
    - ``entropy``: of the probabilities, 1 where all are equal, likewise in 8 bits.
    - ``polygons``: the classes as GeoParquet.
    - ``picture``: PNG of the classes with a legend.

    A regression has one product, ``values``, in float32.

    Args:
        task: The task, of :func:`geofm.tasks.fine_tuned.load_fine_tuned`.
        files: Raster of each sensor that the task needs, by key.
        output: Folder to write to.
        products: What to make.
        options: How.
        reference: Sensor whose grid the products are on. Default: as for
            :func:`geofm.maps.map_scene`.
        names: Names of the bands of a file by sensor, where the file does not say.
        device: Where to compute; by default where the task is.
        command: How to name the call in the tags of the files.

    Returns:
        The files by product.

    Raises:
        ValueError: If a product is unknown, a raster of a sensor is missing or cannot be used, or
            the task does not take such windows.
    """
    prediction = Prediction.prepare(task, products, options, device, command)
    return predict_files(prediction, files, output, reference, names)


def predict_files(
    prediction: Prediction,
    files: Mapping[str, Path],
    output: Path,
    reference: str | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Path]:
    """Apply a prediction to one scene, see :func:`predict_scene`.

    Args:
        prediction: What to apply.
        files: Raster of each sensor, by key.
        output: Folder to write to.
        reference: Sensor whose grid the products are on.
        names: Names of the bands of a file by sensor, where the file does not say.

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
    """Map what a fine-tuned task says of every scene of a table.

    Args:
        prediction: What to apply to the scenes.
        scenes: The scenes.
        output: Folder of a folder for each scene.
        part: Which of the scenes this process maps.

    Returns:
        What became of the scenes, see :func:`geofm.maps.make.tables.run_table`.
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
    """The products to make, in their order; none of a regression, which has its values."""
    if task.kind == 'regression':
        return ()
    every: tuple[ClassProduct, ...] = get_args(ClassProduct)
    if unknown := [p for p in products if p not in every]:
        raise ValueError(f'unknown products {unknown}: choose from {list(every)}')
    if task.several and (wrong := [p for p in products if p != 'probabilities']):
        raise ValueError(
            f'{", ".join(wrong)}: the task gives a place several labels or none, so there are only '
            'probabilities: give --products [probabilities]'
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
        return_memory()
    if 'polygons' in products:
        write_polygons(made['classes'], made['polygons'], legend, prediction.options.simplify)
    if 'picture' in products:
        draw_classes(made['classes'], made['picture'], legend)


def _cut(
    strips: Iterator[Strip], shape: tuple[int, int], patch_size: int, scale: np.float32
) -> Iterator[Strip]:
    """Strips without what lies beyond the scene, as numbers instead of 8 bits."""
    row = 0
    for strip in strips:
        rows = min(strip.values.shape[1], shape[0] - row)
        if rows <= 0:
            return
        values = strip.values[:, :rows, : shape[1]].astype(np.float32) / scale
        yield Strip(values, strip.valid[: rows * patch_size, : shape[1] * patch_size])
        row += rows
