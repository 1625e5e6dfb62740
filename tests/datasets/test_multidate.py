from datetime import date, timedelta
from pathlib import Path

import pytest
import torch
from rasterio.windows import Window

from geofm.datasets import SEN12MSCRTS, MultiDate
from geofm.sen12ms import PIXEL_SIZE, PairKey
from tests.datasets.tree import SIZE, grid_at, write_pair


@pytest.fixture(scope='module')
def pairs(module_path: Path) -> SEN12MSCRTS:
    """Three patches with 4, 1 and 2 dates. The dates of the last one are on two grids."""

    def write(patch: int, time_step: int, x: float) -> None:
        day = date(2018, 1, 1) + timedelta(days=10 * time_step)
        key = PairKey('ROIs1868', 36, patch, time_step)
        write_pair(module_path, key, grid_at(4326, x, 47.5), day, day + timedelta(days=2))

    for time_step in range(4):
        # Rounding as in real files.
        write(0, time_step, 7 + time_step * 1e-10 * PIXEL_SIZE)
    write(1, 0, 7.1)
    write(2, 0, 7.2)
    write(2, 1, 7.2 + PIXEL_SIZE / 2)
    return SEN12MSCRTS(module_path)


def test_a_sample_is_a_place(pairs: SEN12MSCRTS) -> None:
    places = MultiDate(pairs, 2)
    assert len(pairs) == 7
    assert places.index['patch'].tolist() == [0, 1, 2, 2]
    sample = places[0]
    assert sample['image'].shape == (2, 15, SIZE, SIZE)
    assert sample['valid'].shape == (2, SIZE, SIZE)
    assert sample['dates'].shape == (2, 2)
    assert torch.equal(sample['transform'], pairs[0]['transform'])
    assert set(sample) == {*pairs[0], 'pairs'}


def test_dates_are_drawn_without_repetition_and_belong_to_their_pixels(pairs: SEN12MSCRTS) -> None:
    places = MultiDate(pairs, 3)
    by_date = {tuple(pairs[i]['dates'].tolist()): pairs[i]['image'] for i in range(4)}
    orders = set()
    for _ in range(20):
        sample = places[0]
        days = [tuple(row) for row in sample['dates'].tolist()]
        assert len(set(days)) == 3
        for day, image in zip(days, sample['image'], strict=True):
            assert torch.equal(image, by_date[day])
        orders.add(tuple(days))
    assert len(orders) > 10


def test_too_few_dates_are_repeated(pairs: SEN12MSCRTS) -> None:
    sample = MultiDate(pairs, 3)[1]
    assert sample['image'].shape[0] == 3
    assert torch.equal(sample['image'][0], sample['image'][1])
    days = MultiDate(pairs, 9)[0]['dates'][:, 0].tolist()
    assert len(days) == 9
    assert len(set(days)) == 4


def test_all_dates_of_a_window_show_the_same_ground(pairs: SEN12MSCRTS) -> None:
    window = Window(5, 3, 8, 10)
    places = MultiDate(pairs, 4)
    sample = places.read_pair(0, window)
    whole = {tuple(pairs[i]['dates'].tolist()): pairs[i]['image'] for i in range(4)}
    for day, image in zip(sample['dates'].tolist(), sample['image'], strict=True):
        assert torch.equal(image, whole[tuple(day)][:, 3:13, 5:13])


def test_files_of_another_grid_are_another_place(pairs: SEN12MSCRTS) -> None:
    places = MultiDate(pairs, 2)
    for place, pair in ((2, 5), (3, 6)):
        sample = places[place]
        assert torch.equal(sample['transform'], pairs[pair]['transform'])
        for image in sample['image']:
            assert torch.equal(image, pairs[pair]['image'])


def test_real_series(shared_data: Path) -> None:
    pairs = SEN12MSCRTS(shared_data / 'real' / 'crts_layout', 'all')
    places = MultiDate(pairs, 2)
    two = [i for i, row in enumerate(places.index.itertuples()) if row.roi == 22]
    days = {tuple(row) for row in places[two[0]]['dates'].tolist()}
    assert len(days) == 2
    keys = pairs.index[['season', 'roi', 'patch']].drop_duplicates()
    assert len(places) == len(keys)


def test_bad_arguments(pairs: SEN12MSCRTS) -> None:
    with pytest.raises(ValueError, match='n_dates'):
        MultiDate(pairs, 0)
    with pytest.raises(IndexError, match='place 4 of 4'):
        MultiDate(pairs, 2)[4]
