"""The command that writes the samples of a table as shards."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from geofm.datasets import (
    INDEX,
    SHARD_BYTES,
    EmptySplitError,
    RasterArchive,
    SplitRule,
    upload_shards,
    write_shards,
)
from geofm.datasets.archive import Edge, Split, open_archive
from geofm.datasets.pairs import MIN_OVERLAP
from geofm.printing import counted, say


def shard(
    table: Path,
    dest: str,
    window_size: int | None = None,
    sensor_keys: Sequence[str] = (),
    bands: Sequence[str] | None = None,
    split_by: SplitRule | None = None,
    reference_sensor: str | None = None,
    edge: Edge = 'shift',
    max_day_gap: int | None = None,
    min_overlap: float = MIN_OVERLAP,
    allow_missing: Sequence[str] = (),
    num_workers: int = 0,
    shard_mib: int = SHARD_BYTES // 2**20,
) -> None:
    """Write the samples of a table as shards, one folder per split.

    Splits that exist already are kept, so that a command that was stopped can be repeated.

    Args:
        table: Table of rasters written by `geofm index`.
        dest: Folder to write to, or a URL such as s3://bucket/folder.
        window_size: Height and width in pixels of the windows that each scene is divided into; each
            window is a sample. By default whole scenes are samples.
        sensor_keys: Keys of the sensors; by default all sensors of the table.
        bands: Names of the bands; by default all bands of the sensors.
        split_by: How samples are split, e.g. --split_by.by place; by default by the column `split`.
        reference_sensor: Sensor whose grid the samples are on. By default Sentinel-2 if the table
            has it, else the first sensor in geofm's own order whose images change over time.
        edge: Treatment of a remainder at the edge of a scene: `shift` the last window inwards, or
            `drop` the remainder.
        max_day_gap: Maximum number of days between an observation and that of the reference sensor;
            by default there is no limit.
        min_overlap: Minimum fraction (0 to 1) of the area of a sample that each sensor must cover.
        allow_missing: Keys of sensors that may be missing in a sample; by default none.
        num_workers: Number of processes that read files; with 0, the main process reads them.
        shard_mib: Size of a shard in MiB.

    Raises:
        ValueError: If no split has a sample, or an argument is out of range.
    """
    if shard_mib < 1:
        raise ValueError(f'shard_mib must be 1 MiB or more, not {shard_mib}')
    archive = open_archive(str(table))
    written = 0
    split: Split
    for split in ('train', 'val', 'test'):
        try:
            samples = RasterArchive(
                archive,
                sensor_keys or archive.table.sensors,
                bands,
                reference_sensor,
                split,
                split_by,
                window_size,
                edge,
                max_day_gap,
                min_overlap,
                allow_missing,
            )
        except EmptySplitError as error:
            empty = error
            continue
        written += 1
        _write(samples, dest.rstrip('/'), num_workers, shard_mib * 2**20)
    if not written:
        raise empty


def _write(samples: RasterArchive, destination: str, num_workers: int, shard_bytes: int) -> None:
    """Write the shards of a split."""
    is_remote = '://' in destination
    target = f'{destination}/{samples.split}'
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / samples.split if is_remote else Path(target)
        if (folder / INDEX).exists():
            say(f'{target}: exists already, kept')
            return
        errors = write_shards(samples, folder, num_workers, shard_bytes)
        if is_remote:
            upload_shards(folder, target)
        size = sum(file.stat().st_size for file in folder.iterdir())
    if errors:
        say(f'left out: {counted(len(errors), "unreadable sample")}, e.g. {errors[0]}')
    written = counted(len(samples) - len(errors), 'sample')
    say(f'{target}: {written}, {size / 1e6:,.1f} MB')
