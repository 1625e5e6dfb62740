"""The command that applies a fine-tuned checkpoint to scenes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from geofm.commands.tables_mapped import command_line, raise_failed, say_scenes
from geofm.datasets import SplitRule
from geofm.datasets.archive import Split
from geofm.datasets.labels import LabelSource, open_labels
from geofm.maps.make import (
    ClassProduct,
    Part,
    Prediction,
    PredictOptions,
    own_device,
    predict_files,
    predict_table,
)
from geofm.maps.scene import Missing, TableScenes, files_by_sensor
from geofm.messages import UsageError
from geofm.printing import say
from geofm.sensors import BandError, check_bands
from geofm.tasks import load_fine_tuned


def predict(
    checkpoint: Path,
    s1: Path | None = None,
    s2: Path | None = None,
    output: Path = Path('maps'),
    products: list[ClassProduct] | None = None,
    window: int = 224,
    overlap: float = 0.5,
    batch_size: int = 4,
    simplify: float = 0.0,
    bands: list[str] | None = None,
    missing_bands: Missing | None = None,
    missing_sensors: bool = False,
    device: str | None = None,
    scene: dict[str, Path] | None = None,
    scene_bands: dict[str, list[str]] | None = None,
    table: Path | None = None,
    split: Split = 'all',
    split_by: SplitRule | None = None,
    split_window: int | None = None,
    place: list[str] | None = None,
    reference_sensor: str | None = None,
    reference: Path | None = None,
    reference_column: str | None = None,
    block_pixels: int = 64,
    part: str | None = None,
) -> None:
    """Map the classes, or the values of a regression, that a fine-tuned checkpoint predicts.

    With --table, every scene of a table is mapped. To resume a run that was stopped, give the same
    command again. With --config, this is Lightning's predict.

    Args:
        checkpoint: Checkpoint of a fine-tuned task: TorchGeo's Classification,
            SemanticSegmentation or PixelwiseRegression, or geofm's Mask2Former.
        s1: Sentinel-1 scene: VV and VH in dB, on any grid.
        s2: Sentinel-2 scene in digital numbers (DN). The products are on its grid, unless
            --reference_sensor is given.
        output: Folder to write to; with --table, each scene has a folder of its own in it.
        products: Any of classes, probabilities, entropy, polygons and picture. By default classes
            and picture; probabilities if a pixel may have several classes. A regression has a
            single product, its values.
        window: Side of a window in pixels, preferably the size of the training images. A
            Classification predicts one class per window.
        overlap: Minimum overlap of neighbouring windows, as a fraction of the window, in [0, 1).
        batch_size: Number of windows per forward pass.
        simplify: Tolerance for the simplification of polygons, in units of the scene's CRS.
        bands: Band names of the input channels, if the checkpoint does not contain them.
        missing_bands: Value of a band that the model needs and a file lacks: `mean` (of the band)
            or `zero`. By default a missing band is an error.
        missing_sensors: Also map scenes that lack sensors of the task, if its backbone supports
            missing sensors.
        device: Device to compute on, e.g. cuda; the CPU by default.
        scene: Raster of a sensor, given by its key, e.g. --scene s1=FILE --scene dem=FILE.
        scene_bands: Band names of a raster that does not name its bands, e.g.
            --scene_bands landsat=[B02,B03,B04].
        table: Table of rasters written by `geofm index`. Every place and date is a scene.
        split: Split of the table to map.
        split_by: How the scenes of the table are split, e.g. --split_by.by place; by default by its
            column `split`.
        split_window: `window_size` of the data module that the task was trained with. Give it if
            scenes are split by place, since that split depends on the number of windows.
        place: Places of the table to map; by default all.
        reference_sensor: Sensor whose grid the products are on. By default Sentinel-2 if it is
            given, else the first sensor in geofm's own order whose images change over time.
        reference: Raster or vector file with the true classes, or a band of the table, such as
            landcover.class. The accuracy is printed and written.
        reference_column: With a vector file as --reference: column that contains the class.
        block_pixels: Side of the blocks of the spatial bootstrap, which gives the intervals of the
            accuracy, in pixels of the map.
        part: With --table: I/N to map only part I of N, counted from 0. By default from the
            environment of torchrun, srun or a SLURM job array.
    """
    rasters = files_by_sensor(s1, s2, scene)
    if table is not None and (rasters or scene_bands):
        raise UsageError('give --table or the files of one scene, not both')
    if table is None and (split != 'all' or split_by or split_window or place or part):
        raise UsageError('--split, --place and --part select scenes of a table: give --table')
    task = load_fine_tuned(checkpoint, bands)
    options = PredictOptions(window, overlap, batch_size, missing_bands, simplify, missing_sensors)
    chosen: list[ClassProduct] = products or (
        ['probabilities'] if task.several else ['classes', 'picture']
    )
    if reference is not None and (task.kind == 'regression' or 'classes' not in chosen):
        raise UsageError('--reference compares classes: add classes to --products')
    if block_pixels < 1:
        raise ValueError(f'--block_pixels {block_pixels}: a block must have at least one pixel')
    command = command_line()
    prediction = Prediction.prepare(task, chosen, options, own_device(device), command)
    if table is not None:
        scenes = TableScenes(
            table,
            task.bands,
            split=split,
            split_by=split_by,
            window_size=split_window,
            places=place,
            reference=reference_sensor,
            missing_bands=missing_bands,
            missing_sensors=missing_sensors,
        )
        _predict_table(
            prediction, scenes, output, reference, reference_column, block_pixels, Part.of(part)
        )
        return
    labels = None
    if reference is not None:
        # Before the scene is mapped, so that errors in the reference show at once.
        labels = open_labels(reference, column=reference_column, legend=task.legend)
        prediction = replace(prediction, keep=labels.files)
    files = predict_files(prediction, rasters, output, reference_sensor, scene_bands)
    for path in files.values():
        say(path)
    if labels is not None:
        classes = files['classes']
        _assess({classes: labels}, str(reference), block_pixels, output, f'{classes.stem}_accuracy')


def _predict_table(
    prediction: Prediction,
    scenes: TableScenes,
    output: Path,
    reference: Path | None,
    column: str | None,
    block: int,
    part: Part,
) -> None:
    """Map the scenes of a table, print a summary, and compare the maps with a reference."""
    if scenes.left_out:
        say(f'left out: {scenes.left_out}')
    if reference is not None and not part.is_all:
        raise UsageError(
            '--reference compares all scenes, but this process maps only a part of them: run the '
            'command once more with --reference and without --part when all parts are mapped'
        )
    # Before the scenes are mapped, so that errors in the reference show at once.
    labels = None if reference is None else _labels(scenes, reference, column, prediction)
    if labels is not None:
        kept = dict.fromkeys(path for source in labels if source for path in source.files)
        prediction = replace(prediction, keep=tuple(kept))
    found = predict_table(prediction, scenes, output, part)
    say_scenes(found, output, len(part.items(len(scenes))))
    if labels is not None and found.files:
        sources = {
            files['classes']: source
            for number, files in found.files.items()
            if (source := labels[number]) is not None
        }
        _assess(sources, str(reference), block, output, 'accuracy')
    raise_failed(found)


def _labels(
    scenes: TableScenes, reference: Path, column: str | None, prediction: Prediction
) -> Sequence[LabelSource | None]:
    """Return the reference of each scene: a band of the table, or the same file for all scenes."""
    legend = prediction.task.legend
    name = str(reference)
    if not reference.exists():
        try:
            check_bands([name])
        except BandError:
            # Not a band: a pattern of files, or a wrong name, which is reported below.
            pass
        else:
            return scenes.labels(name, legend)
    return [open_labels(reference, column=column, legend=legend)] * len(scenes)


def _assess(
    sources: Mapping[Path, LabelSource], reference: str, block: int, output: Path, stem: str
) -> None:
    """Print and write the accuracy of maps."""
    from geofm.evaluation import assess_maps

    accuracy = assess_maps(sources, reference, block)
    Console().print(accuracy.table(reference))
    for path in accuracy.save(output, stem):
        say(path)
