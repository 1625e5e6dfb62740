"""Maps of what a fine-tuned task says of every scene of a table of rasters."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import rasterio

from geofm.atomic import atomic_file, check_not_overwritten
from geofm.locking import locked_folder
from geofm.maps.predict import CACHE_BYTES, Prediction, show_progress
from geofm.maps.scene import Imagery
from geofm.maps.table_scenes import TableScenes
from geofm.printing import say
from geofm.rasters import RASTER_ERRORS

#: In the folder of a scene that is finished: what its files were made with, and which they are.
_DONE = 'prediction.json'


@dataclass
class TablePrediction:
    """What became of the scenes of a table.

    Attributes:
        files: Files of each finished scene by product, by number of the scene.
        skipped: Number of those that were finished before.
        failed: What is wrong with each of the others, by its name.
    """

    files: dict[int, dict[str, Path]] = field(default_factory=dict)
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def predict_table(
    prediction: Prediction,
    scenes: TableScenes,
    output: Path,
    report: Callable[[str], None] = say,
) -> TablePrediction:
    """Map what a fine-tuned task says of every scene of a table.

    Each scene has a folder of its own, named after it. A scene that is finished is not done again,
    unless the task, the options or its files have changed. A scene that fails does not keep the
    others from being done.

    Args:
        prediction: What to apply to the scenes.
        scenes: The scenes.
        output: Folder of the folders.
        report: Is told of each scene that fails, at once.

    Returns:
        What became of them.
    """
    found = TablePrediction()
    with (
        locked_folder(output),
        rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES),
        show_progress() as progress,
    ):
        bar = progress.add_task('Scenes', total=len(scenes))
        for number, name in enumerate(scenes.names):
            folder = output / name
            try:
                scene = scenes.scene(number)
                check_not_overwritten(prediction.keep, prediction.files(scene, folder).values())
                digest = _digest(prediction, scene)
                files = _finished(folder, digest)
                if files is None:
                    files = prediction.run(scene, folder, progress)
                    _finish(folder, digest, files)
                else:
                    found.skipped += 1
                found.files[number] = files
            except RASTER_ERRORS as error:
                found.failed[name] = str(error)
                report(f'failed: {name}: {error}')
            for task in progress.task_ids:
                if task != bar:
                    progress.remove_task(task)
            progress.advance(bar)
    return found


def _digest(prediction: Prediction, scene: Imagery) -> str:
    """Hash of all that the files of a scene depend on."""
    entry = {
        **prediction.manifest(scene),
        'products': prediction.products,
        'simplify': prediction.options.simplify,
        'legend': prediction.task.legend.entry(),
    }
    return hashlib.sha256(json.dumps(entry).encode()).hexdigest()


def _finished(folder: Path, digest: str) -> dict[str, Path] | None:
    """Files of a scene that is finished, None if it is not, or was made with something else."""
    try:
        entry = json.loads((folder / _DONE).read_text())
        files = {str(product): folder / Path(name).name for product, name in entry['files'].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    done = entry.get('made_with') == digest and all(path.is_file() for path in files.values())
    return files if done else None


def _finish(folder: Path, digest: str, files: dict[str, Path]) -> None:
    """Note that a scene is finished."""
    names = {product: path.name for product, path in files.items()}
    with atomic_file(folder / _DONE) as part:
        part.write_text(json.dumps({'made_with': digest, 'files': names}, indent=1) + '\n')
