from datetime import date
from pathlib import Path

import pytest

from geofm.sen12ms import PIXEL_SIZE, PairKey
from tests.datasets.tree import SIZE, grid_at, write_pair

STEP = SIZE * PIXEL_SIZE


@pytest.fixture(scope='session')
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ROIs in three CRSs: 2 x 2 patches x 2 dates in EPSG:4326 (train), and UTM patches."""
    root = tmp_path_factory.mktemp('crts')
    for patch in range(4):
        grid = grid_at(4326, 11.98 + patch % 2 * STEP, 47.5 - patch // 2 * STEP)
        write_pair(
            root, PairKey('ROIs1868', 36, patch, 0), grid, date(2018, 1, 3), date(2018, 1, 5)
        )
        write_pair(
            root, PairKey('ROIs1868', 36, patch, 1), grid, date(2018, 1, 9), date(2018, 1, 8)
        )
    write_pair(root, PairKey('ROIs1970', 21, 10, 0), grid_at(32735, 400000, 7000000))
    write_pair(root, PairKey('ROIs2017', 22, 2, 3), grid_at(32632, 700000, 5300000))
    write_pair(root, PairKey('ROIs2017', 32, 12, 4), grid_at(32632, 540003.7, 5300001.2))
    return root
