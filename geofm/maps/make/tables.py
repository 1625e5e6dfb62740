"""Processing every scene of a table once, with one process or several."""

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

from geofm.atomic import write_atomically
from geofm.datasets import SEARCH_CRS
from geofm.locking import locked_folder
from geofm.maps.scene import CACHE_BYTES, Imagery, TableScenes
from geofm.printing import say
from geofm.rasters import RASTER_ERRORS

#: Media types of assets by suffix. Assets with another suffix have none.
_MEDIA = {
    '.tif': pystac.MediaType.COG,
    '.png': pystac.MediaType.PNG,
    '.parquet': pystac.MediaType.PARQUET,
    '.gpkg': pystac.MediaType.GEOPACKAGE,
    '.geojson': pystac.MediaType.GEOJSON,
}


@dataclass(frozen=True)
class Part:
    """Part of the work of one process: every n-th item.

    Attributes:
        number: Index of the part and of its first item, from 0.
        count: Number of parts n.
    """

    number: int
    count: int

    @classmethod
    def of(cls, text: str | None, environment: Mapping[str, str] = os.environ) -> Self:
        """Return the part of this process.

        Args:
            text: 'I/N', part I of N, with I from 0. None: the part is taken from the variables of
                torchrun, of a step of srun, or of a SLURM job array. An array can be combined with
                torchrun or srun.
            environment: Environment variables.

        Returns:
            The part; all of the work if there are no such variables.

        Raises:
            ValueError: If the text is invalid.
        """
        if text is not None:
            match = re.fullmatch(r'(\d+)/(\d+)', text)
            if match is None or not int(match[1]) < int(match[2]):
                raise ValueError(f"part '{text}' must be I/N, with I from 0 to N - 1, such as 0/4")
            return cls(int(match[1]), int(match[2]))

        def number(name: str, default: int) -> int:
            return int(environment.get(name) or default)

        # Outside srun, the script of a job is one process, so SLURM_NTASKS is not used.
        rank, ranks = number('SLURM_PROCID', 0), number('SLURM_STEP_NUM_TASKS', 1)
        if 'WORLD_SIZE' in environment:
            rank, ranks = number('RANK', 0), number('WORLD_SIZE', 1)
        first, step = number('SLURM_ARRAY_TASK_MIN', 0), number('SLURM_ARRAY_TASK_STEP', 1)
        job = (number('SLURM_ARRAY_TASK_ID', first) - first) // step
        jobs = number('SLURM_ARRAY_TASK_COUNT', 1)
        # Indices of an array such as 3,7 have gaps, hence the modulo.
        return cls(job % jobs * ranks + rank % ranks, jobs * ranks)

    @property
    def is_all(self) -> bool:
        """Whether this part is all of the work."""
        return self.count == 1

    def items(self, length: int) -> range:
        """Return the indices of the items of this part.

        Args:
            length: Number of all items.

        Returns:
            The indices.
        """
        return range(self.number, length, self.count)


#: All of the work.
ALONE = Part(0, 1)


def own_device(device: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the device of a process of torchrun, which may have others on the same machine.

    Args:
        device: A device, such as 'cuda'.
        environment: Environment variables.

    Returns:
        The device with the local rank as its index, unless it is the CPU or has an index.
    """
    number = environment.get('LOCAL_RANK')
    if device in (None, 'cpu') or number is None or ':' in str(device):
        return device
    return f'{device}:{number}'


def show_progress() -> Progress:
    """Create a progress bar with the number of items and the remaining time."""
    return Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        TextColumn('{task.completed:.0f} of {task.total:.0f}'),
        TimeRemainingColumn(),
    )


@dataclass
class TableRun:
    """Result of processing the scenes of a table.

    Attributes:
        files: Files by product of each finished scene, by index of the scene.
        skipped: Number of scenes that were finished by an earlier run.
        failed: Error of each failed scene, by name.
        catalogue: STAC catalogue of the products; None until all scenes are finished.
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

    Each scene has its own folder, named after it. A finished scene is skipped unless anything that
    its products depend on has changed. A failed scene does not stop the others. The process that
    finishes the last scene writes a STAC catalogue.

    Args:
        scenes: The scenes.
        output: Folder that contains the folders of the scenes.
        run: Function that makes the products of a scene in a folder, and returns the files by
            product.
        made_with: Function that returns everything that the products of a scene depend on, as data
            for JSON.
        kind: Stem of the file that marks a scene as finished, ``{kind}.json`` in its folder.
        part: Which of the scenes this process runs.
        report: Function that prints a message, called for each failed scene.

    Returns:
        The result for the scenes of the part.

    Raises:
        LockedError: If another process runs the same scenes.
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
    """Return the files of a finished scene; None if it is unfinished or made differently."""
    try:
        entry = json.loads(note.read_text())
        files = {str(p): note.parent / Path(name).name for p, name in entry['files'].items()}
        made_with = entry['made_with']
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    done = digest in (None, made_with) and all(path.is_file() for path in files.values())
    return files if done else None


def _finish(note: Path, digest: str, files: Mapping[str, Path]) -> None:
    """Mark a scene as finished."""
    names = {product: path.name for product, path in files.items()}
    _write_json(note, {'made_with': digest, 'files': names})


def write_catalogue(scenes: TableScenes, files: Sequence[Mapping[str, Path]], folder: Path) -> Path:
    """Write a self-contained STAC catalogue: ``catalog.json``, and an item in each scene's folder.

    Args:
        scenes: The scenes. Scenes without a date are left out, because STAC requires one.
        files: Files by product of each scene, in its folder.
        folder: Folder that contains the folders of the scenes.

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
    """Return the item of a scene's products; None if the scene has no date."""
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
    write_atomically(file, json.dumps(content, indent=1) + '\n')
