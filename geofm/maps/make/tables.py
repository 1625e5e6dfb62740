"""Doing something once for every scene of a table, on one process or many."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import pystac
import rasterio
import shapely
from pystac.extensions.projection import ProjectionExtension
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from geofm.atomic import atomic_file
from geofm.datasets import SEARCH_CRS
from geofm.locking import locked_folder
from geofm.maps.scene import Imagery, TableScenes
from geofm.printing import say
from geofm.rasters import RASTER_ERRORS

#: GDAL's cache in bytes. Its default, a share of the machine's memory, is more than is needed.
CACHE_BYTES = 128 * 2**20

#: Media types by ending; others have none.
_MEDIA = {
    '.tif': pystac.MediaType.COG,
    '.png': pystac.MediaType.PNG,
    '.parquet': pystac.MediaType.PARQUET,
    '.gpkg': pystac.MediaType.GEOPACKAGE,
    '.geojson': pystac.MediaType.GEOJSON,
}


@dataclass(frozen=True)
class Part:
    """Every n-th item, from some item on.

    Attributes:
        number: Number of the part, from 0.
        count: Number of parts.
    """

    number: int
    count: int

    @classmethod
    def of(cls, text: str | None, environment: Mapping[str, str] = os.environ) -> Self:
        """The part that a process was given.

        Args:
            text: 'I/N', part I of N, from 0; None: as torchrun, a step of srun or an array of SLURM
                says, of which an array and one of the others may come together.
            environment: Variables of the environment.

        Returns:
            The part; all of the work if nothing says otherwise.

        Raises:
            ValueError: If the text is no part.
        """
        if text is not None:
            match = re.fullmatch(r'(\d+)/(\d+)', text)
            if match is None or not int(match[1]) < int(match[2]):
                raise ValueError(f"part '{text}' must be I/N, with I from 0 to N - 1, such as 0/4")
            return cls(int(match[1]), int(match[2]))

        def number(name: str, default: int) -> int:
            return int(environment.get(name) or default)

        # In the script of a job, outside srun, there is one process, whatever SLURM_NTASKS says.
        rank, ranks = number('SLURM_PROCID', 0), number('SLURM_STEP_NUM_TASKS', 1)
        if 'WORLD_SIZE' in environment:
            rank, ranks = number('RANK', 0), number('WORLD_SIZE', 1)
        first, step = number('SLURM_ARRAY_TASK_MIN', 0), number('SLURM_ARRAY_TASK_STEP', 1)
        job = (number('SLURM_ARRAY_TASK_ID', first) - first) // step
        jobs = number('SLURM_ARRAY_TASK_COUNT', 1)
        # A list of array indices, such as 3,7, has gaps.
        return cls(job % jobs * ranks + rank % ranks, jobs * ranks)

    @property
    def is_all(self) -> bool:
        """Whether it is all of the work."""
        return self.count == 1

    def items(self, length: int) -> range:
        """Numbers of the items of the part.

        Args:
            length: Number of all items.

        Returns:
            The numbers.
        """
        return range(self.number, length, self.count)


#: All of the work.
ALONE = Part(0, 1)


def own_device(device: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The device of a process that torchrun started beside others on its machine.

    Args:
        device: A device, such as 'cuda'.
        environment: Variables of the environment.

    Returns:
        The device with the number of the process on its machine, unless it has one already.
    """
    number = environment.get('LOCAL_RANK')
    if device in (None, 'cpu') or number is None or ':' in str(device):
        return device
    return f'{device}:{number}'


def show_progress() -> Progress:
    """A progress bar that tells how many there are and how much time is left."""
    return Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        TextColumn('{task.completed:.0f} of {task.total:.0f}'),
        TimeRemainingColumn(),
    )


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
    _write_json(note, {'made_with': digest, 'files': names})


def write_catalogue(scenes: TableScenes, files: Sequence[Mapping[str, Path]], folder: Path) -> Path:
    """Write a self-contained STAC catalogue: ``catalog.json``, and an item in each scene's folder.

    Args:
        scenes: The scenes. Those of which no date is known are left out, for STAC asks for one.
        files: Files of each scene by product, in its folder.
        folder: Folder of the scenes' folders.

    Returns:
        The catalogue.
    """
    catalogue = pystac.Catalog(
        'geofm',
        f'Products of {scenes.table.source}',
        catalog_type=pystac.CatalogType.SELF_CONTAINED,
    )
    for number, products in enumerate(files):
        item = _item(scenes.scene(number), products)
        if item is not None:
            catalogue.add_item(item)
    file = folder / pystac.Catalog.DEFAULT_FILE_NAME
    catalogue.normalize_hrefs(str(folder.absolute()))
    for item in catalogue.get_items():
        item.make_asset_hrefs_relative()
        _write_json(folder / item.id / f'{item.id}.json', item.to_dict(include_self_link=False))
    _write_json(file, catalogue.to_dict(include_self_link=False))
    return file


def _item(scene: Imagery, products: Mapping[str, Path]) -> pystac.Item | None:
    """The products of a scene; None if it has no date."""
    days = [day for day in scene.days.values() if not np.isnat(day)]
    if not days:
        return None
    first, last = (
        datetime.combine(d.item(), datetime.min.time(), UTC) for d in (min(days), max(days))
    )
    outline = scene.grid.footprint(SEARCH_CRS)
    item = pystac.Item(
        scene.stem,
        json.loads(shapely.to_geojson(outline)),
        list(outline.bounds),
        first if first == last else None,
        {},
        None if first == last else first,
        None if first == last else last,
    )
    ProjectionExtension.ext(item, add_if_missing=True).apply(
        epsg=scene.grid.crs.to_epsg(),
        shape=list(scene.grid.shape),
        transform=list(scene.grid.transform)[:6],
    )
    for product, path in sorted(products.items()):
        media = _MEDIA.get(path.suffix)
        item.add_asset(
            product, pystac.Asset(str(path.absolute()), media_type=media, roles=['data'])
        )
    return item


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON."""
    with atomic_file(file) as part:
        part.write_text(json.dumps(content, indent=1) + '\n')
