"""The command that computes the statistics of each band."""

from pathlib import Path
from typing import Any

from rich.progress import track
from torch.utils.data import DataLoader

from geofm.commands.data import is_table
from geofm.datasets import (
    SEN12MSCR,
    SEN12MSCRTS,
    Split,
    SplitRule,
    dataset_statistics,
    write_statistics,
)
from geofm.datasets.archive import table_statistics
from geofm.datasets.pairs import list_scenes
from geofm.printing import say


def stats(
    root: Path,
    output: Path = Path('statistics.yaml'),
    split: Split = 'train',
    num_workers: int = 0,
    split_by: SplitRule | None = None,
) -> None:
    """Compute the mean, standard deviation and percentiles of each band over the valid pixels.

    Give the file to a data module as its argument `statistics`.

    Args:
        root: Table of rasters (.parquet, .csv), or folder of SEN12MS-CR-TS or SEN12MS-CR.
        output: YAML file to write.
        split: Split whose samples are read.
        num_workers: Number of processes that read files; with 0, the main process reads them.
        split_by: How the samples of a table are split, e.g. --split_by.by place; by default by its
            column `split`.
    """
    about: dict[str, Any] = {'root': str(root), 'split': split}
    if is_table(root):
        bands, observations = table_statistics(root, split, split_by, num_workers, track)
        about['observations'] = observations
    else:
        pairs = _dataset(root, split)
        loader = DataLoader(pairs, batch_size=None, num_workers=num_workers)
        samples = track(loader, description='Reading pairs', total=len(pairs))
        bands = dataset_statistics(samples, pairs.bands, str(root))
        about['pairs'] = len(pairs)
    write_statistics(output, bands, about)
    width = max(map(len, bands))
    for band, values in bands.items():
        print(f'{band:<{width}} {values["mean"]:10.2f} ± {values["std"]:9.2f} {values["unit"]}')
    say(output)


def _dataset(root: Path, split: Split) -> SEN12MSCRTS:
    """Open the data set of a folder."""
    listing = list_scenes(root)
    if not len(listing.rows(dated=False)):
        return SEN12MSCRTS(root, split)
    if len(listing.rows(dated=True)):
        raise ValueError(f'{root}: holds both SEN12MS-CR-TS and SEN12MS-CR: give the folder of one')
    return SEN12MSCR(root, split)
