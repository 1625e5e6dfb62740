"""Commands that make and look through data."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader

from geofm.atomic import atomic_file
from geofm.commands.tables import TABLES, index_table
from geofm.datasets import SEN12MSCR, SEN12MSCRTS, write_sample_data, write_sample_scenes
from geofm.datasets.archive.statistics import table_statistics
from geofm.datasets.catalogue.catalogue import JOBS, Catalogue, update_catalogue
from geofm.datasets.catalogue.inspection import UNNAMED, look_at_values
from geofm.datasets.catalogue.scenes import Scenes
from geofm.datasets.pairs.inputs import Listing, list_scenes
from geofm.datasets.pairs.pairing import pair_scenes
from geofm.datasets.pairs.skipped import Reason, Skipped
from geofm.datasets.pairs.table import MIN_OVERLAP, Draft, PairTable, check_overlap
from geofm.datasets.splitting import SplitRule, split_tree
from geofm.datasets.statistics import dataset_statistics, write_statistics
from geofm.printing import printable, say
from geofm.sen12ms import Split
from geofm.sensors import DEFAULT_SENSORS, SENSORS
from geofm.units import warn_of_unit, wrong_unit

#: Files of each sensor whose values ``geofm index`` looks at together.
_LOOKED_AT = 64


def sample_data(
    dest: Path, seed: int = 0, layout: Literal['sen12mscrts', 'scenes', 'bands'] = 'sen12mscrts'
) -> None:
    """Write a small generated data set.

    It has land cover for evaluation. It is generated, not observed: no result on it is science.

    Args:
        dest: Folder to write to.
        seed: Seed of the landscape.
        layout: Layout of the files: that of SEN12MS-CR-TS; or one folder per place, with an
            elevation model, and one file per scene ('scenes') or per band ('bands').
    """
    if layout == 'sen12mscrts':
        say(write_sample_data(dest, seed=seed))
    else:
        say(write_sample_scenes(dest, 'scene' if layout == 'scenes' else 'band', seed=seed))


def index(
    root: Path,
    output: Path | None = None,
    jobs: int = JOBS,
    clouds: bool = False,
    pairs_json: Path | None = None,
    min_overlap: float = MIN_OVERLAP,
    layout: str | None = None,
    stac: bool = False,
) -> None:
    """Make the table of an archive, or the catalogue of SEN12MS-CR-TS or SEN12MS-CR.

    With --layout or --stac, or if the root is a table (.csv, .parquet), the files are listed in a
    table of rasters, which the data set RasterArchive reads. Each file is opened once.

    Otherwise the folder is one of SEN12MS-CR-TS or SEN12MS-CR. Each file's header and some of its
    rows are read once. Run again, only files that are new or changed are read, and those that are
    gone leave the catalogue. Datasets use the catalogue that lies beside the data.

    Args:
        root: Folder of the data; a STAC item, collection, item collection or stac-geoparquet file;
            or a table to scan.
        output: Where to write the catalogue or table. A catalogue is a GeoParquet file, by default
            beside the data, or in the user's cache if the folder cannot be written to. A table
            ends in .parquet or .csv; by default it is named like the root.
        jobs: Number of threads that read.
        clouds: Work out the cloud cover of each Sentinel-2 file too, with s2cloudless.
        pairs_json: Also write the pairs of all splits, [[s1, s2], ...], to this file.
        min_overlap: Least fraction, 0 to 1, of a Sentinel-2 patch that the Sentinel-1 file of its
            pair must cover. Pairs below are named and left out.
        layout: How the names of the files say sensor, place, date and band: a YAML file, or the
            name of a built-in layout (sen12mscrts, sen12mscr).
        stac: The root is of STAC.
    """
    if layout is not None or stac or (root.suffix.lower() in TABLES and root.is_file()):
        if clouds or pairs_json is not None:
            raise ValueError('--clouds and --pairs-json are for catalogues, not for tables')
        index_table(root, output, layout, stac, jobs)
        return
    check_overlap(min_overlap)
    catalogue = update_catalogue(root, output, jobs, clouds)
    say(f'{catalogue.file}: {len(catalogue.table)} files')
    _print_problems(catalogue)
    if not catalogue.table['problem'].isna().any():
        raise ValueError(f'{root}: no usable scene of SEN12MS-CR-TS or SEN12MS-CR')
    _check_values(catalogue)
    skipped = Skipped()
    pairs = _pairs(catalogue, skipped, min_overlap)
    for path in skipped.files.get(Reason.APART, []):
        say(f'left out: {path}: {Reason.APART} (less than {min_overlap:.0%})')
    if said := pairs.partial_overlap():
        say(said)
    if pairs_json is not None:
        say(f'{pairs_json}: {_write_pairs(pairs, pairs_json)} pairs')


def split(
    root: Path,
    dest: Path,
    copy: bool = False,
    val: float | None = None,
    test: float | None = None,
    seed: int = 0,
) -> None:
    """Write the folders train, val and test with links to the files of a data set.

    Files are split by region of interest (ROI), so that no ground is in two splits: after the
    official lists or, if a share is given, at random. Folders of a random split are opened with
    split='all': the data set's own splits are the official ones.

    Args:
        root: Folder of SEN12MS-CR-TS or SEN12MS-CR.
        dest: Folder to write; it must not exist.
        copy: Copy the files rather than link to them.
        val: Fraction of the ROIs for validation, 0 to 1.
        test: Fraction of the ROIs for testing, 0 to 1.
        seed: Seed of the draw.
    """
    shares = None if val is None and test is None else (val or 0.0, test or 0.0)
    for name, files in split_tree(root, dest, copy, shares, seed).items():
        say(f'{dest / name}: {files} files')
    if shares is not None:
        print("These are not the official splits: open each folder with split='all'.")


def stats(
    root: Path,
    output: Path = Path('statistics.yaml'),
    split: Split = 'train',
    num_workers: int = 0,
    split_by: SplitRule | None = None,
) -> None:
    """Work out mean, standard deviation and percentiles of each band over the valid pixels.

    The file is for the argument 'statistics' of the data module.

    Args:
        root: Table of rasters (.parquet, .csv), or folder of SEN12MS-CR-TS or SEN12MS-CR.
        output: YAML file to write.
        split: Split to look at.
        num_workers: Number of processes that read.
        split_by: Of a table: how samples are split, as --split_by.by place; by its column 'split'
            if not given.
    """
    about: dict[str, Any] = {'root': str(root), 'split': split}
    if root.suffix.lower() in TABLES:
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
    """The data set that a folder holds."""
    listing = list_scenes(root)
    if not len(listing.rows(dated=False)):
        return SEN12MSCRTS(root, split)
    if len(listing.rows(dated=True)):
        raise ValueError(f'{root}: holds SEN12MS-CR-TS and SEN12MS-CR; name the folder of one')
    return SEN12MSCR(root, split)


def _print_problems(catalogue: Catalogue) -> None:
    """Print one table of what is wrong."""
    problems = catalogue.problems()
    if problems.empty:
        print('No problems.')
        return
    table = Table('Problem', 'Files', 'First', title='Problems', title_justify='left', box=None)
    for problem, files, first in problems.itertuples(index=False, name=None):
        # Text is not taken for markup, as brackets in a string are.
        table.add_row(*(Text(printable(cell)) for cell in (problem, files, first)))
    # Paths are there to be copied: they are not cut to the width of the terminal.
    width = 200 + max(len(printable(first)) for first in problems['first'])
    Console(width=width, soft_wrap=True).print(table)


def _check_values(catalogue: Catalogue) -> None:
    """Say which order of bands is assumed, and warn of values in another unit, by some files."""
    table = catalogue.table[catalogue.table['problem'].isna()]
    for key, sensor in SENSORS.items():
        files = table[table['sensor'] == key]
        if files.empty:
            continue
        if (files['names'] == UNNAMED).any():
            say(
                f'{sensor.title}: files without names of bands are taken to have '
                f'{" ".join(sensor.band_names)}, in this order'
            )
        some = files.sample(min(len(files), _LOOKED_AT), random_state=0)['path'].tolist()
        values = [look_at_values(catalogue.root / path, key) for path in some]
        wrong = [i for i, part in enumerate(values) if wrong_unit(part, sensor) is not None]
        # Of one file it cannot be told whether it is all cloud.
        if len(wrong) > max(1, len(some) // 4) or len(wrong) == len(some) > 0:
            source = f'{len(wrong)} of {len(some)} files (e.g. {printable(some[wrong[0]])})'
            warn_of_unit(np.concatenate([values[i] for i in wrong]), sensor, source)


def _pairs(catalogue: Catalogue, skipped: Skipped, min_overlap: float) -> PairTable:
    """Pairs of a catalogue, of all splits."""
    scenes = Scenes.read([catalogue.source()])
    listing, sensors = Listing(scenes), DEFAULT_SENSORS
    # A folder may hold SEN12MS-CR-TS and SEN12MS-CR.
    series = pair_scenes(scenes, listing.rows(dated=True), sensors, 'time_step', skipped)
    single = pair_scenes(scenes, listing.rows(dated=False), sensors, 'patch', skipped)
    found = {sensor: np.concatenate([series[sensor], single[sensor]]) for sensor in sensors}
    return Draft.of(scenes, found).complete(skipped, min_overlap=min_overlap)


def _write_pairs(pairs: PairTable, file: Path) -> int:
    """Write pairs; their number."""
    listed = [
        [str(Path(str(pairs.path(i, sensor))).absolute()) for sensor in DEFAULT_SENSORS]
        for i in range(len(pairs))
    ]
    with atomic_file(file) as part:
        part.write_text(json.dumps(listed, indent=0) + '\n')
    return len(listed)
