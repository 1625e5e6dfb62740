import os
import random
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geofm.cli import main
from geofm.datasets import SEN12MSCRTS
from geofm.datasets.catalogue import catalogue as module
from geofm.datasets.catalogue.catalogue import (
    Catalogue,
    CatalogueError,
    beside,
    open_file,
    update_catalogue,
)
from geofm.datasets.catalogue.columns import STORED
from geofm.datasets.catalogue.inspection import Problem
from geofm.locking import LockedError, locked_name
from tests.datasets.catalogue.test_catalogue import KEY
from tests.datasets.tree import grid_at, write_pair

SEED, MUTANTS = 5, 200


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for patch in range(12):
        write_pair(tmp_path / 'in', KEY._replace(patch=patch), grid_at(32632, 5e5, 5.3e6))
    return tmp_path / 'in'


def damage_pages(file: Path) -> None:
    """Flip bits in the data of every column, but not in the footer."""
    content = bytearray(file.read_bytes())
    for place in range(8, len(content) // 2, 20):
        content[place] ^= 0xFF
    file.write_bytes(content)


def set_column(file: Path, name: str, values: pa.Array | None) -> None:
    table = pq.read_table(file)
    i = table.column_names.index(name)
    table = table.remove_column(i) if values is None else table.set_column(i, name, values)
    pq.write_table(table, file)


DAMAGES: dict[str, Callable[[Path], object]] = {
    'pages': damage_pages,
    'empty': lambda file: file.write_bytes(b''),
    'truncated': lambda file: file.write_bytes(file.read_bytes()[:-100]),
    'text': lambda file: file.write_text('not a catalogue'),
    'foreign': lambda file: pq.write_table(pa.table({'a': [1]}), file),
    'lacks a column': lambda file: set_column(file, 'transform', None),
    'another type': lambda file: set_column(file, 'size', pa.array(['a'] * 24)),
    'no state': lambda file: pq.write_table(
        pq.read_table(file).replace_schema_metadata({'geofm': '[]'}), file
    ),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_catalogue_is_recreated(
    root: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = update_catalogue(root).table
    file = beside(root)
    DAMAGES[damage](file)
    # The error is one line that says what to do.
    for read in (lambda: SEN12MSCRTS(root, 'all'), lambda: Catalogue.read(file, root)):
        with pytest.raises(CatalogueError) as caught:
            read()
        message = str(caught.value)
        assert message.startswith(f'{file}: ')
        assert message.endswith(f"recreate it with 'geofm index {root}'")
        assert '\n' not in message
    main(['index', str(root)])
    assert '24 files' in capsys.readouterr().out
    pd.testing.assert_frame_equal(Catalogue.read(file, root).table, table)
    assert len(SEN12MSCRTS(root, 'all')) == 12


def test_a_large_damaged_catalogue_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'SMALL', 1)
    update_catalogue(root)
    damage_pages(beside(root))
    with pytest.raises(CatalogueError, match='recreate it'):
        SEN12MSCRTS(root, 'all')


def mutated(content: bytes, random: random.Random) -> bytes:
    """Return a file with bytes flipped, removed, or inserted."""
    data = bytearray(content)
    kind = random.choice(['flip', 'flip', 'cut', 'insert', 'footer'])
    if kind == 'cut':
        return bytes(data[: random.randrange(len(data))])
    if kind == 'insert':
        place = random.randrange(len(data))
        return bytes(data[:place] + random.randbytes(random.randint(1, 50)) + data[place:])
    first = int.from_bytes(data[-8:-4], 'little') + 8 if kind == 'footer' else len(data)
    for _ in range(random.choice([1, 1, 5, 50])):
        data[-random.randint(1, first)] ^= 1 << random.randrange(8)
    return bytes(data)


def test_mutated_catalogues_are_errors_or_unchanged(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading gives an error of one line or the same table, and the catalogue can be recreated."""
    expected = update_catalogue(root).table
    file = beside(root)
    content = file.read_bytes()
    generator = random.Random(SEED)
    messages = []
    for number in range(MUTANTS):
        file.write_bytes(mutated(content, generator))
        try:
            found = Catalogue.read(file, root)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                batches = list(open_file(file, root).batches(STORED))
        except CatalogueError as error:
            messages.append(str(error))
        else:
            assert sum(batch.num_rows for batch in batches) == len(found.table)
            pd.testing.assert_frame_equal(found.table, expected)
        # Recreating takes longer.
        if number % 20 == 0:
            main(['index', str(root)])
            assert '24 files' in capsys.readouterr().out
            pd.testing.assert_frame_equal(Catalogue.read(file, root).table, expected)
    assert len(messages) > MUTANTS / 2
    assert not any('\n' in message for message in messages)


def test_index_waits_for_no_pipe_and_follows_no_loop(root: Path) -> None:
    folder = next(root.rglob('s2_*_patch_1.tif')).parent
    name = next(folder.glob('*.tif')).name
    names = [f'{Path(name).stem.rpartition("_")[0]}_{90 + i}.tif' for i in range(4)]
    os.mkfifo(folder / names[0])
    before = Path.cwd()
    os.chdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(names[1])
    finally:
        os.chdir(before)
    (folder / names[2]).symlink_to(names[2])
    (folder / names[3]).symlink_to('nowhere')
    (folder / 'loop').symlink_to(root)
    (root / 'itself').symlink_to('itself')
    table = update_catalogue(root).table
    assert len(table) == 28
    problems = table.set_index('path')['problem'].dropna()
    assert {Path(path).name for path in problems.index} == set(names)
    assert set(problems) == {Problem.UNREADABLE}
    with pytest.warns(UserWarning, match='left out'):
        assert len(SEN12MSCRTS(root, 'all')) == 12


def test_a_folder_is_found_where_it_lies_and_not_by_a_link(root: Path) -> None:
    paths = set(update_catalogue(root).table['path'])
    (root / 'A-link').symlink_to(next(root.glob('ROIs*')))
    (root / 'z-link').symlink_to(next(root.glob('ROIs*')))
    assert set(update_catalogue(root).table['path']) == paths


def test_hidden_files_are_not_catalogued(root: Path) -> None:
    file = next(root.rglob('*.tif'))
    shutil.copy(file, file.with_name(f'._{file.name}'))
    assert len(update_catalogue(root).table) == 24


def test_one_index_at_a_time(root: Path) -> None:
    code = f"""
import time
from pathlib import Path
from geofm.locking import locked_name
with locked_name(Path({str(beside(root))!r})):
    print('held', flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(LockedError, match=f'process {holder.pid} on'):
        update_catalogue(root)
    # Datasets do not keep the file open.
    assert len(SEN12MSCRTS(root, 'all')) == 12
    holder.kill()
    holder.wait()
    assert len(update_catalogue(root).table) == 24
    assert [p.name for p in root.glob('.*')] == [beside(root).name]
    with locked_name(beside(root)):
        update_catalogue(root)
