"""Large tables, which are memory-mapped by all processes of a machine."""

import multiprocessing
import pickle
from multiprocessing.context import set_spawning_popen
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from geofm.datasets import EmptySplitError, RasterArchive
from geofm.datasets.archive import mapping
from geofm.datasets.memory.shared_array import SharedArray
from geofm.datasets.table import RasterTable, open_table
from tests.datasets.archive.tables import sample_table

SPLIT = {'by': 'place', 'val': 0.3, 'test': 0}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table that is large enough to be mapped."""
    monkeypatch.setattr(mapping, 'LEAST_ROWS', 1)
    table = sample_table(tmp_path / 'scenes', size=120, dates=2)
    file = tmp_path / 'table.parquet'
    table.write(file)
    return file


def opened(table: Path | RasterTable, split: Any = 'train') -> RasterArchive:
    return RasterArchive(table, ['s1', 's2'], split=split, split_by=SPLIT, window_size=64)


def check_same(ours: RasterArchive, theirs: RasterArchive) -> None:
    assert len(ours) == len(theirs)
    assert ours.bands == theirs.bands
    assert str(ours.skipped) == str(theirs.skipped)
    assert ours.matches.count_places() == theirs.matches.count_places()
    assert ours.index.drop(columns='transform').equals(theirs.index.drop(columns='transform'))
    for i in (0, len(ours) - 1):
        one, other = ours[i], theirs[i]
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def arrays_of(data: RasterArchive) -> list[Any]:
    table, observations = data.table, data.matches.archive.observations
    everything = [*vars(table).values(), *vars(observations).values(), *data.matches.arrays]
    everything += [*table.paths.parts, data.matches.archive.main.array]
    return [value for value in everything if isinstance(value, np.ndarray)]


def test_a_mapped_archive_is_that_of_the_table(file: Path) -> None:
    private = {split: opened(RasterTable.read(file), split) for split in ('train', 'val', 'all')}
    for split, reference in private.items():
        for _ in range(2):
            data = opened(file, split)
            check_same(data, reference)
            for array in arrays_of(data):
                assert isinstance(array.base, np.memmap)
                assert not array.flags.writeable
    with pytest.raises(EmptySplitError, match='no sample in split'):
        opened(file, 'test')
    # A spawned worker maps the same files; other copies are in memory.
    set_spawning_popen(object())  # type: ignore[arg-type]
    try:
        sent = pickle.dumps(data)
    finally:
        set_spawning_popen(None)
    assert len(sent) < 20_000
    for other in (pickle.loads(sent), pickle.loads(pickle.dumps(data))):
        check_same(other, private['all'])


def test_a_part_of_a_mapped_array_is_sent_as_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / 'a.npy', np.arange(12).reshape(3, 4))
    array = np.load(tmp_path / 'a.npy', mmap_mode='r').view(np.ndarray)
    assert SharedArray(array)._file == str(tmp_path / 'a.npy')
    for part in (array[1:], array.T, array.reshape(-1), array[:, 1:], array.view(float)):
        assert SharedArray(part)._file is None


def test_a_table_that_changed_is_read_again(file: Path) -> None:
    before, table = opened(file, 'all'), RasterTable.read(file)
    table.take(np.flatnonzero(table.place < 3)).write(file)
    after = opened(file, 'all')
    assert 0 < len(after) < len(before)
    assert len(list(file.parent.glob('table.parquet.arrays-*'))) == 1
    # Arrays that were mapped earlier stay readable.
    assert torch.equal(before[len(before) - 1]['image'], before[len(before) - 1]['image'])


def test_small_tables_and_folders_that_cannot_be_written(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = opened(RasterTable.read(file))
    with monkeypatch.context() as patched:
        patched.setattr('os.access', lambda *_: False)
        with pytest.warns(UserWarning, match='each process keeps its own copy'):
            check_same(opened(file), reference)
    monkeypatch.setattr(mapping, 'LEAST_ROWS', 1_000_000)
    check_same(opened(file), reference)
    assert not list(file.parent.glob('*.arrays-*'))


def build(file: Path, made: Path) -> None:
    """Open a table, and record whether this process read it."""

    def noted(table: Any) -> RasterTable:
        made.with_suffix(f'.{multiprocessing.current_process().name}').touch()
        return open_table(table)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mapping, 'open_table', noted)
        assert len(opened(file)) > 0


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='needs fork')
def test_one_process_reads_the_table_while_the_others_wait(file: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=build, args=(file, tmp_path / 'made')) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.glob('made.*'))) == 1
