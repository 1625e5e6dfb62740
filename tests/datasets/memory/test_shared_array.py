import copy
import multiprocessing
import pickle
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from geofm.datasets import SEN12MSCRTS
from geofm.datasets.memory.path_list import BLOCK, PathList
from geofm.datasets.memory.shared_array import SharedArray


def is_in_shared_memory(array: np.ndarray[Any, Any]) -> bool:
    """Check whether an array is in a mapping that processes share."""
    address = array.__array_interface__['data'][0]
    for line in Path('/proc/self/maps').read_text().splitlines():
        bounds, flags = line.split()[:2]
        first, last = (int(bound, 16) for bound in bounds.split('-'))
        if first <= address < last:
            return flags.endswith('s')
    raise AssertionError('not mapped')


def look(shared: SharedArray, queue: 'multiprocessing.Queue[tuple[bool, float]]') -> None:
    queue.put((is_in_shared_memory(shared.array), float(shared.array['x'].sum())))


def test_new_processes_share_it(forkserver: ForkServerContext) -> None:
    array = np.zeros(100_000, [('x', float, 3), ('y', np.int32)])
    array['x'] = 0.5
    shared = SharedArray(array)
    assert not is_in_shared_memory(shared.array)
    queue: multiprocessing.Queue[tuple[bool, float]] = forkserver.Queue()
    process = forkserver.Process(target=look, args=(shared, queue))
    process.start()
    assert queue.get(timeout=60) == (True, 150_000.0)
    process.join()
    assert is_in_shared_memory(shared.array)
    np.testing.assert_array_equal(shared.array, array)


@pytest.mark.parametrize('size', [0, 7])
def test_copies_are_whole(size: int) -> None:
    array = np.arange(size, dtype=np.int32)
    for other in (
        pickle.loads(pickle.dumps(SharedArray(array))),
        copy.deepcopy(SharedArray(array)),
    ):
        np.testing.assert_array_equal(other.array, array)


@pytest.mark.parametrize('count', [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
@pytest.mark.parametrize('part', [1, 7, BLOCK, 1000])
def test_paths_in_blocks(count: int, part: int) -> None:
    import pyarrow as pa

    paths = [f'/data/ROIs{i % 7}/ü {i}.tif' for i in range(count)]
    listed = PathList(pa.array(paths[i : i + part], pa.string()) for i in range(0, count, part))
    assert len(listed) == count
    assert [listed[i] for i in range(count)] == paths
    order = np.random.default_rng(0).permutation(count)
    assert listed.take(order) == [paths[i] for i in order]
    with pytest.raises(IndexError):
        listed[count]


class Watched(Dataset[tuple[bool, bool, int]]):
    """Dataset that returns whether the pairs are in shared memory and there is no index."""

    def __init__(self, pairs: SEN12MSCRTS) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[bool, bool, int]:
        shared = is_in_shared_memory(self.pairs.pairs.records)
        return shared, self.pairs._frame is None, int(self.pairs[index]['index'])


def test_workers_get_no_index_and_no_copy_of_the_pairs(
    tree: Path, forkserver: ForkServerContext
) -> None:
    ds = SEN12MSCRTS(tree, 'all')
    assert len(ds.index) == 11
    loader = DataLoader(
        Watched(ds), batch_size=None, num_workers=1, multiprocessing_context=forkserver
    )
    assert [tuple(map(int, item)) for item in loader] == [(1, 1, 0), (1, 1, 1)]
    for other in (copy.deepcopy(ds), pickle.loads(pickle.dumps(ds))):
        assert torch.equal(other[4]['image'], ds[4]['image'])
        assert other.index.equals(ds.index)
