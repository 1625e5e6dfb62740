"""Indexing a folder of SEN12MS-CR-TS or SEN12MS-CR in a catalogue."""

import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from geofm.atomic import write_atomically
from geofm.datasets.catalogue import UNNAMED, Catalogue, Scenes, sample_values, update_catalogue
from geofm.datasets.pairs import (
    Draft,
    Listing,
    PairTable,
    Reason,
    Skipped,
    check_overlap,
    pair_scenes,
)
from geofm.printing import counted, printable, say
from geofm.sensors import DEFAULT_SENSORS, SENSORS
from geofm.units import warn_of_unit, wrong_unit

#: Number of files of each sensor whose values are checked together.
_CHECKED = 64


def index_catalogue(
    root: Path,
    output: Path | None,
    jobs: int,
    clouds: bool,
    pairs_json: Path | None,
    min_overlap: float,
) -> None:
    """Make or update the catalogue of a folder, and print its problems.

    Args:
        root: Folder of SEN12MS-CR-TS or SEN12MS-CR.
        output: File of the catalogue; by default beside the data.
        jobs: Number of threads that read files.
        clouds: Whether to estimate the cloud cover of each Sentinel-2 file.
        pairs_json: File to write the pairs of all splits to.
        min_overlap: Smallest fraction of a Sentinel-2 patch that its Sentinel-1 file must cover.

    Raises:
        ValueError: If no file of the folder can be used.
    """
    check_overlap(min_overlap)
    catalogue = update_catalogue(root, output, jobs, clouds)
    say(f'{catalogue.file}: {counted(len(catalogue.table), "file")}')
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
        say(f'{pairs_json}: {counted(_write_pairs(pairs, pairs_json), "pair")}')


def _print_problems(catalogue: Catalogue) -> None:
    """Print a table of the problems of a catalogue."""
    problems = catalogue.problems()
    if problems.empty:
        print('No problems.')
        return
    table = Table('Problem', 'Files', 'First', title='Problems', title_justify='left', box=None)
    for problem, files, first in problems.itertuples(index=False, name=None):
        # In a Text, brackets are not read as markup.
        table.add_row(*(Text(printable(cell)) for cell in (problem, files, first)))
    # Do not cut paths to the width of the terminal: they are meant to be copied.
    width = 200 + max(len(printable(first)) for first in problems['first'])
    Console(width=width, soft_wrap=True).print(table)


def _check_values(catalogue: Catalogue) -> None:
    """Print the assumed band order and warn of values in another unit, based on some files."""
    table = catalogue.table[catalogue.table['problem'].isna()]
    for key, sensor in SENSORS.items():
        files = table[table['sensor'] == key]
        if files.empty:
            continue
        if (files['names'] == UNNAMED).any():
            say(
                f'{sensor.title}: files that do not name their bands are assumed to have '
                f'{" ".join(sensor.band_names)}, in this order'
            )
        some = files.sample(min(len(files), _CHECKED), random_state=0)['path'].tolist()
        values = [sample_values(catalogue.root / path, key) for path in some]
        wrong = [i for i, part in enumerate(values) if wrong_unit(part, sensor) is not None]
        # A single file may be all cloud.
        if len(wrong) > max(1, len(some) // 4) or len(wrong) == len(some) > 0:
            source = f'{len(wrong)} of {len(some)} files (e.g. {printable(some[wrong[0]])})'
            warn_of_unit(np.concatenate([values[i] for i in wrong]), sensor, source)


def _pairs(catalogue: Catalogue, skipped: Skipped, min_overlap: float) -> PairTable:
    """Return the pairs of all splits of a catalogue."""
    scenes = Scenes.read([catalogue.source()])
    listing, sensors = Listing(scenes), DEFAULT_SENSORS
    # A folder may hold SEN12MS-CR-TS and SEN12MS-CR.
    series = pair_scenes(scenes, listing.rows(dated=True), sensors, 'time_step', skipped)
    single = pair_scenes(scenes, listing.rows(dated=False), sensors, 'patch', skipped)
    found = {sensor: np.concatenate([series[sensor], single[sensor]]) for sensor in sensors}
    return Draft.of(scenes, found).complete(skipped, min_overlap=min_overlap)


def _write_pairs(pairs: PairTable, file: Path) -> int:
    """Write pairs to a JSON file and return their number."""
    listed = [
        [str(Path(str(pairs.path(i, sensor))).absolute()) for sensor in DEFAULT_SENSORS]
        for i in range(len(pairs))
    ]
    write_atomically(file, json.dumps(listed, indent=0) + '\n')
    return len(listed)
