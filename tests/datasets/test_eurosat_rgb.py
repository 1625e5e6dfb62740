import csv
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchgeo.datasets import DatasetNotFoundError

from geofm.datamodules import EuroSATRGBDataModule, NamedBandsDataModule
from geofm.datasets import EuroSATRGB
from geofm.datasets.eurosat_rgb import cells_of_split


def write(root: Path, patches: int = 40) -> None:
    """Patches of one colour each, two per cell."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(root / 'eurosat_rgb.zip', 'w') as archive:
        rows = []
        for i in range(patches):
            label = ('Forest', 'River')[i % 2]
            name = f'{label}/{label}_{i}.jpg'
            colour = np.full((64, 64, 3), (200, i, 20), np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(colour).save(buffer, 'JPEG', quality=100, subsampling=0)
            archive.writestr(name, buffer.getvalue())
            place = np.array([-3.0, 10.0]) + i // 2 + rng.uniform(0, 1, 2)
            rows.append((name, label, *place))
    with (root / 'latlon.csv').open('w', newline='') as file:
        csv.writer(file).writerows([('path', 'label', 'latitude', 'longitude'), *rows])


def test_whole_cells_go_to_one_split(tmp_path: Path) -> None:
    write(tmp_path)
    splits = {name: EuroSATRGB(tmp_path, name) for name in ('train', 'val', 'test')}
    assert {name: len(split) for name, split in splits.items()} == {
        'train': 24,
        'val': 8,
        'test': 8,
    }
    seen = [path for split in splits.values() for path, _, _ in split.rows]
    assert len(set(seen)) == 40
    for split in splits.values():
        for other in splits.values():
            if other is not split:
                assert not {row[2] for row in split.rows} & {row[2] for row in other.rows}


def test_samples_are_dn_by_band(tmp_path: Path) -> None:
    write(tmp_path)
    dataset = EuroSATRGB(tmp_path)
    path, label, (latitude, _) = dataset.rows[3]
    number = int(path.split('_')[1].removesuffix('.jpg'))
    assert latitude == number // 2 - 3
    sample = dataset[3]
    assert sample['image'].shape == (3, 64, 64)
    # B04, B03, B02. JPEG is accurate to two levels.
    expected = torch.tensor([200.0, number, 20.0]) * 2750 / 255
    assert (sample['image'].mean(dim=(1, 2)) - expected).abs().max() < 2 * 2750 / 255
    assert dataset.classes[int(sample['label'])] == label

    source = EuroSATRGBDataModule(batch_size=4, root=tmp_path)
    named = NamedBandsDataModule(['B04', 'B03', 'B02'], source, bands=['B02', 'B04'])
    named.setup('test')
    batch = next(iter(named.test_dataloader()))
    assert batch['image'].shape == (4, 2, 64, 64)


@given(
    st.sets(st.tuples(st.integers(-90, 89), st.integers(-180, 179)), min_size=5), st.integers(0, 9)
)
def test_splits_part_the_cells(cells: set[tuple[int, int]], seed: int) -> None:
    parts = [cells_of_split(cells, name, seed) for name in ('train', 'val', 'test')]
    assert set.union(*parts) == cells
    assert sum(map(len, parts)) == len(cells)
    assert all(parts)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError):
        EuroSATRGB(tmp_path)
    write(tmp_path)
    with pytest.raises(ValueError, match="'train', 'val' or 'test'"):
        EuroSATRGB(tmp_path, 'all')  # type: ignore[arg-type]
    (tmp_path / 'eurosat_rgb.zip').write_bytes(b'no zip')
    with pytest.raises(ValueError, match=r'eurosat_rgb\.zip: cannot be read'):
        EuroSATRGB(tmp_path)
    (tmp_path / 'latlon.csv').write_text('path,label\na,b\n')
    with pytest.raises(ValueError, match=r'latlon\.csv: must have the columns'):
        EuroSATRGB(tmp_path)
