"""The command that applies a fine-tuned checkpoint to scenes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from geofm.commands.tables_mapped import command_line, raise_failed, say_scenes
from geofm.datasets.archive.dataset import Split
from geofm.datasets.labels import LabelSource, open_labels
from geofm.datasets.splitting import SplitRule
from geofm.maps.make.predict import (
    ClassProduct,
    Prediction,
    PredictOptions,
    predict_files,
    predict_table,
)
from geofm.maps.make.tables import Part, own_device
from geofm.maps.scene import Missing, TableScenes, files_by_sensor
from geofm.printing import say
from geofm.sensors import BandError, check_bands
from geofm.tasks.fine_tuned import load_fine_tuned


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
    place: str | list[str] | None = None,
    reference_sensor: str | None = None,
    reference: Path | None = None,
    reference_column: str | None = None,
    block: int = 64,
    part: str | None = None,
) -> None:
    """Map what a fine-tuned checkpoint says of a scene: classes, or numbers of a regression.

    With --table, every scene of a table is mapped. With --config this is Lightning's predict. A run
    that was stopped resumes when it is given again.

    Args:
        checkpoint: Checkpoint of TorchGeo's Classification, SemanticSegmentation or
            PixelwiseRegression, or of geofm's Mask2Former.
        s1: Sentinel-1 scene: VV and VH in dB, on any grid.
        s2: Sentinel-2 scene: bands as DN. Its grid is that of the products.
        output: Folder to write to; with --table, to a folder in it for each scene.
        products: Any of classes, probabilities, entropy, polygons and picture; classes and picture
            if not given.
        window: Side of a window in pixels; best the size that the task was trained with. Of a
            Classification it is the area that gets one class.
        overlap: Least fraction of a window that the next one covers too, in [0, 1).
        batch_size: Windows per forward pass.
        simplify: Tolerance by which polygons are simplified, in units of the scene's CRS.
        bands: Names of the input channels, if the checkpoint does not say.
        missing_bands: What stands for a band that a file lacks: its `mean` or `zero`; an error if
            not given.
        missing_sensors: Predict scenes that lack sensors which the task was fine-tuned with, as far
            as the backbone can do without.
        device: Where to compute, e.g. cuda; on the CPU if not given.
        scene: Scenes of any sensors by key, as --scene s1=FILE --scene dem=FILE.
        scene_bands: Names of the bands of files of any sensors, if they do not say, as
            --scene_bands landsat=[B02,B03,B04].
        table: Table of rasters, as `geofm index` writes it: every place and date is a scene.
        split: Split of the table whose scenes to map.
        split_by: How the scenes of the table are split, as --split_by.by place; by its column
            `split` if not given.
        split_window: `window_size` of the data module that the task was trained with, since a split
            by place depends on the number of windows.
        place: Place of the table whose scenes to map, or several as [a,b]; all if not given.
        reference_sensor: Sensor whose grid the products are on; Sentinel-2 where it is given, else
            the first that does not stay the same over time.
        reference: Raster or features with the true classes, or a band of the table, such as
            landcover.class; the accuracy is printed and written.
        reference_column: Column of the features that holds the class.
        block: Side of the spatial blocks that the intervals of the accuracy are drawn from, in
            pixels of the map.
        part: With --table, the scenes of this process as I/N, part I of N from 0; as torchrun, srun
            or an array of SLURM says if not given.
    """
    rasters = files_by_sensor(s1, s2, scene)
    if table is not None and (rasters or scene_bands):
        raise ValueError('give --table or the files of one scene, not both')
    if table is None and (split != 'all' or split_by or split_window or place or part):
        raise ValueError('--split, --place and --part choose scenes of a table: give --table')
    task = load_fine_tuned(checkpoint, bands)
    options = PredictOptions(window, overlap, batch_size, missing_bands, simplify, missing_sensors)
    chosen: list[ClassProduct] = products or (
        ['probabilities'] if task.several else ['classes', 'picture']
    )
    if reference is not None and (task.kind == 'regression' or 'classes' not in chosen):
        raise ValueError('--reference compares classes: add classes to --products')
    if block < 1:
        raise ValueError(f'block {block}: a block has at least one pixel')
    command = command_line()
    prediction = Prediction.prepare(task, chosen, options, own_device(device), command)
    if table is not None:
        scenes = TableScenes(
            table,
            task.bands,
            split=split,
            split_by=split_by,
            window_size=split_window,
            places=[place] if isinstance(place, str) else place,
            reference=reference_sensor,
            missing_bands=missing_bands,
            missing_sensors=missing_sensors,
        )
        _predict_table(
            prediction, scenes, output, reference, reference_column, block, Part.of(part)
        )
        return
    labels = None
    if reference is not None:
        # What is wrong with the reference is found out before the scene is mapped.
        labels = open_labels(reference, column=reference_column, legend=task.legend)
        prediction = replace(prediction, keep=labels.files)
    files = predict_files(prediction, rasters, output, reference_sensor, scene_bands)
    for path in files.values():
        say(path)
    if labels is not None:
        classes = files['classes']
        _assess({classes: labels}, str(reference), block, output, f'{classes.stem}_accuracy')


def _predict_table(
    prediction: Prediction,
    scenes: TableScenes,
    output: Path,
    reference: Path | None,
    column: str | None,
    block: int,
    part: Part,
) -> None:
    """Map the scenes of a table, say what became of them, and compare them with a reference."""
    if scenes.left_out:
        say(f'left out: {scenes.left_out}')
    if reference is not None and not part.is_all:
        raise ValueError(
            '--reference compares all scenes, and this process maps a part of them: give it to a '
            'last run of one process, which finds them mapped'
        )
    # What is wrong with the reference is found out before the scenes are mapped.
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
    """The reference of each scene: a band of the table, or files for all of them."""
    legend = prediction.task.legend
    name = str(reference)
    if not reference.exists():
        try:
            check_bands([name])
        except BandError:
            # A pattern; or what is opened next says what is wrong.
            pass
        else:
            return scenes.labels(name, legend)
    return [open_labels(reference, column=column, legend=legend)] * len(scenes)


def _assess(
    sources: Mapping[Path, LabelSource], reference: str, block: int, output: Path, stem: str
) -> None:
    """Print and write the accuracy of maps."""
    from geofm.evaluation.map_accuracy import assess_maps

    accuracy = assess_maps(sources, reference, block)
    Console().print(accuracy.table(reference))
    for path in accuracy.save(output, stem):
        say(path)
