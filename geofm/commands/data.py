"""Commands that generate, index and split data.

Modules that import PyTorch are imported inside of the functions, so that the help of these commands
is printed without delay.
"""

from pathlib import Path
from typing import Literal

from geofm.messages import UsageError
from geofm.printing import counted, say

#: Suffixes of tables of rasters.
_TABLES = ('.csv', '.parquet', '.geoparquet')


def is_table(path: Path) -> bool:
    """Return whether a path names a table of rasters, by its suffix.

    Args:
        path: File or folder.

    Returns:
        True for .csv, .parquet and .geoparquet files.
    """
    return path.suffix.lower() in _TABLES and not path.is_dir()


def sample_data(
    dest: Path, seed: int = 0, layout: Literal['sen12mscrts', 'scenes', 'bands'] = 'sen12mscrts'
) -> None:
    """Write a small generated data set.

    It includes land cover for evaluation. The images are generated, not observed: results on them
    have no scientific meaning.

    Args:
        dest: Folder to write to.
        seed: Seed of the landscape.
        layout: Layout of the files. `sen12mscrts`: as in SEN12MS-CR-TS. `scenes`: one folder per
            place, with one file per scene and an elevation model. `bands`: the same, with one file
            per band.
    """
    from geofm.sample import write_sample_data, write_sample_scenes

    if layout == 'sen12mscrts':
        say(write_sample_data(dest, seed=seed))
    else:
        say(write_sample_scenes(dest, 'scene' if layout == 'scenes' else 'band', seed=seed))


def index(
    root: Path,
    output: Path | None = None,
    jobs: int = 8,
    clouds: bool = False,
    pairs_json: Path | None = None,
    min_overlap: float = 0.5,
    layout: str | None = None,
    stac: bool = False,
) -> None:
    """Make the table of an archive, or the catalogue of SEN12MS-CR-TS or SEN12MS-CR.

    With --layout or --stac, or if the root is a table (.csv, .parquet), the files are listed in a
    table of rasters, which the data set RasterArchive reads. Each file is opened once.

    Otherwise the root is a folder of SEN12MS-CR-TS or SEN12MS-CR. The header and some rows of each
    file are read once, and the whole file if these rows look wrong. When the command runs again, it
    reads only files that are new or changed, and removes files that no longer exist from the
    catalogue. Data sets use the catalogue that lies beside the data.

    Args:
        root: Folder of the data; a STAC item, collection, item collection or stac-geoparquet file;
            or a table to scan.
        output: File of the catalogue or table. A catalogue is a GeoParquet file, by default beside
            the data, or in the user's cache if the folder is read-only. A table is a .parquet or
            .csv file; by default, the root with the suffix .parquet.
        jobs: Number of threads that read files.
        clouds: For a catalogue: also estimate the cloud cover of each Sentinel-2 file with
            s2cloudless.
        pairs_json: For a catalogue: file for the pairs of all splits, as [[s1, s2], ...].
        min_overlap: For a catalogue: minimum overlap of a pair, as a fraction (0 to 1) of the
            Sentinel-2 patch. Pairs with less overlap are listed and left out.
        layout: How file names encode sensor, place, date and band: a YAML file, the name of a
            shipped layout such as layouts/scenes (see `geofm configs`), sen12mscrts or sen12mscr.
        stac: Read the root as STAC metadata.
    """
    if layout is not None or stac or (is_table(root) and root.is_file()):
        if clouds or pairs_json is not None:
            raise UsageError('--clouds and --pairs-json apply to catalogues, not to tables')
        if stac and layout is not None:
            raise UsageError('give --stac or --layout, not both')
        from geofm.commands.tables import index_table

        index_table(root, output, layout, stac, jobs)
    else:
        from geofm.commands.catalogue import index_catalogue

        index_catalogue(root, output, jobs, clouds, pairs_json, min_overlap)


def split(
    root: Path,
    dest: Path,
    copy: bool = False,
    val: float | None = None,
    test: float | None = None,
    seed: int = 0,
) -> None:
    """Write the folders train, val and test with links to the files of a data set.

    Files are split by region of interest (ROI), so that no area is in two splits. The official
    lists are used unless a fraction is given; then ROIs are drawn at random. In Python, open
    each folder of a random split with `SEN12MSCRTS(FOLDER, split='all')` (or `SEN12MSCR`), because
    the other values of `split` select by the official lists.

    Args:
        root: Folder of SEN12MS-CR-TS or SEN12MS-CR.
        dest: Folder to write; it must not exist.
        copy: Copy the files instead of linking to them.
        val: Fraction of the ROIs for validation, 0 to 1. Without --val and --test, the official
            lists are used.
        test: Fraction of the ROIs for testing, 0 to 1.
        seed: Seed of the random split.
    """
    from geofm.datasets import split_tree

    fractions = None if val is None and test is None else (val or 0.0, test or 0.0)
    for name, files in split_tree(root, dest, copy, fractions, seed).items():
        say(f'{dest / name}: {counted(files, "file")}')
    if fractions is not None:
        print("These are not the official splits: open each folder with split='all'.")
