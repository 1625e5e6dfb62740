"""Doing something once for every scene of a table, on one process or many."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rasterio
from rich.progress import Progress

from geofm.atomic import atomic_file
from geofm.locking import locked_folder
from geofm.maps.catalogue import write_catalogue
from geofm.maps.parts import ALONE, Part
from geofm.maps.progress import CACHE_BYTES, show_progress
from geofm.maps.scene import Imagery
from geofm.maps.table_scenes import TableScenes
from geofm.printing import say
from geofm.rasters import RASTER_ERRORS


@dataclass
class TableRun:
    """What became of the scenes of a table.

    Attributes:
        files: Files of each finished scene by product, by number of the scene.
        skipped: Number of those that were finished before.
        failed: What is wrong with each of the others, by its name.
        catalogue: STAC catalogue of the products, once all scenes of the table are finished.
    """

    files: dict[int, dict[str, Path]] = field(default_factory=dict)
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    catalogue: Path | None = None


def run_table(
    scenes: TableScenes,
    output: Path,
    run: Callable[[Imagery, Path, Progress], dict[str, Path]],
    made_with: Callable[[Imagery], Mapping[str, Any]],
    kind: str,
    part: Part = ALONE,
    report: Callable[[str], None] = say,
) -> TableRun:
    """Make products of every scene of a table.

    Each scene has a folder of its own, named after it. A scene that is finished is not done again,
    unless what its products are made with has changed. A scene that fails does not keep the others
    from being done. The process that finishes the last scene of all writes a STAC catalogue.

    Args:
        scenes: The scenes.
        output: Folder of the folders.
        run: Makes the products of a scene in a folder; the files by product.
        made_with: All that the products of a scene depend on, as JSON holds it.
        kind: Name of the note of a finished scene, ``{kind}.json`` in its folder.
        part: Which of the scenes this process does.
        report: Is told of each scene that fails, at once.

    Returns:
        What became of the scenes of the part.

    Raises:
        LockedError: If another process does the same scenes.
    """
    found, numbers = TableRun(), part.items(len(scenes))
    if not part.is_all:
        report(f'part {part.number} of {part.count}: {len(numbers)} of {len(scenes)} scenes')
    with (
        locked_folder(output) if part.is_all else nullcontext(),
        rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES),
        show_progress() as progress,
    ):
        bar = progress.add_task('Scenes', total=len(numbers))
        for number in numbers:
            name = scenes.names[number]
            folder = output / name
            try:
                scene = scenes.scene(number)
                text = json.dumps(made_with(scene), default=str)
                digest = hashlib.sha256(text.encode()).hexdigest()
                files = _finished(folder / f'{kind}.json', digest)
                if files is None:
                    with nullcontext() if part.is_all else locked_folder(folder):
                        files = run(scene, folder, progress)
                    _finish(folder / f'{kind}.json', digest, files)
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
    done = [_finished(output / name / f'{kind}.json') for name in scenes.names]
    if not found.failed and None not in done:
        found.catalogue = write_catalogue(scenes, [files or {} for files in done], output)
    return found


def _finished(note: Path, digest: str | None = None) -> dict[str, Path] | None:
    """Files of a scene that is finished, None if it is not, or was made with something else."""
    try:
        entry = json.loads(note.read_text())
        files = {str(p): note.parent / Path(name).name for p, name in entry['files'].items()}
        made_with = entry['made_with']
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    done = digest in (None, made_with) and all(path.is_file() for path in files.values())
    return files if done else None


def _finish(note: Path, digest: str, files: Mapping[str, Path]) -> None:
    """Note that a scene is finished."""
    names = {product: path.name for product, path in files.items()}
    with atomic_file(note) as part:
        part.write_text(json.dumps({'made_with': digest, 'files': names}, indent=1) + '\n')
