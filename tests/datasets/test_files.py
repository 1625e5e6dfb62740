from pathlib import Path

import pytest
import shapely
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchgeo.datasets import EuroSAT, stack_samples
from torchgeo.datasets.utils import Sample
from torchgeo.samplers import GriddedPatchSampler

from geofm.datasets import SEN12MSCRTS, MultiDate, NamedBands
from geofm.datasets.files import files_of
from geofm.sensors import BANDS


class Listed(Dataset[Sample]):
    """Dataset whose samples are the number of their file."""

    def __init__(self, files: list[object]) -> None:
        self.files = files

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        return {'image': torch.full((15, 2, 2), float(index))}


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_a_sample_of_pairs_knows_its_files(tree: Path) -> None:
    ds = SEN12MSCRTS(tree, 'all')
    batch = stack_samples([ds[i] for i in (3, 0)])
    assert batch['index'].dtype == torch.int64
    assert batch['index'].tolist() == [3, 0]
    for i in range(len(ds)):
        row = ds.index.iloc[i]
        assert files_of(ds, i) == [Path(row['s1']), Path(row['s2'])]
    assert ds.files_of(-1) == ds.files_of(10)
    assert names(SEN12MSCRTS(tree, sensors=['s2']).files_of(0)) == names(ds.files_of(0))[1:]


def test_samplers_keep_it(tree: Path) -> None:
    ds = SEN12MSCRTS(tree)
    crs = set()
    for lon, lat in ((12, 47.5), (26, -27.1)):
        # The grid of a box of all ROIs would be large.
        roi = shapely.Point(lon, lat).buffer(0.1)
        sampler = GriddedPatchSampler(ds, size=16, stride=32, roi=roi)
        for batch in DataLoader(ds, sampler=sampler, collate_fn=stack_samples):
            (number,) = batch['index'].tolist()
            assert ds[number]['crs'] == batch['crs'][0]
            crs.add(int(batch['crs'][0]))
    assert crs == {4326, 32735}


def test_dates_of_a_place(tree: Path) -> None:
    pairs = SEN12MSCRTS(tree)
    places = MultiDate(pairs, 2)
    sample = places[1]
    assert sample['index'] == 1
    assert sorted(sample['pairs'].tolist()) == [2, 3]
    for day, pair in zip(sample['dates'], sample['pairs'].tolist(), strict=True):
        assert torch.equal(day, pairs[pair]['dates'])
    assert places.files_of(1) == pairs.files_of(2) + pairs.files_of(3)


def test_any_data_set_that_lists_its_files() -> None:
    listed = Listed(['a.tif', Path('b.tif'), ('c.tif', 3), {'s1': 'd.tif', 's2': ['e.tif']}])
    ds = NamedBands(listed, BANDS)
    assert ds[2]['index'] == 2
    assert [names(ds.files_of(i)) for i in range(4)] == [
        ['a.tif'],
        ['b.tif'],
        ['c.tif'],
        ['d.tif', 'e.tif'],
    ]
    part = NamedBands(Subset(listed, [3, 0]), BANDS)
    assert part[1]['index'] == 1
    assert names(part.files_of(1)) == ['a.tif']
    # A list of another length than the dataset is ignored.
    assert files_of(Listed(['archive.zip']), 0) == []
    assert files_of(torch.utils.data.TensorDataset(torch.zeros(3)), 0) == []


def test_files_of_torchgeo(shared_data: Path) -> None:
    root = shared_data / 'torchgeo' / 'eurosat'
    if not root.is_dir():
        pytest.skip('no EuroSAT')
    ds = EuroSAT(root)
    (file,) = files_of(ds, 1)
    assert file == Path(ds.imgs[1][0])
    assert file.is_file()
