from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from hypothesis import given
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.transform import Affine
from torchgeo.datasets import DatasetNotFoundError

from geofm.datasets import SEN12MSCR, EmptySplitError, MultiDate
from geofm.grid import Grid
from geofm.models.dates import NO_DATE
from geofm.sen12ms import (
    ROIS,
    SEN12MSCR_TEST_ROIS,
    SEN12MSCR_VAL_ROIS,
    PatchName,
    sen12mscr_split_of,
    split_of,
)
from tests.datasets.tree import grid_at, random_pixels, write_raster

SEASONS = ('ROIs1158_spring', 'ROIs1868_summer', 'ROIs1970_fall', 'ROIs2017_winter')

#: Distance of neighbouring patches: half a patch.
STRIDE = 160.0


def write_patch(
    root: Path, season: str, roi: int, patch: int, grid: Grid, kinds: tuple[str, ...]
) -> None:
    for i, kind in enumerate(kinds):
        name = PatchName(season, kind, roi, patch)
        pixels = random_pixels(kind[:2], grid, 100 * roi + 10 * patch + i)
        write_raster(root / name.folder / name.filename, pixels, grid)


@pytest.fixture(scope='module')
def tree(module_path: Path) -> Path:
    """Patches that overlap by half in ROIs of all splits, in two UTM zones."""
    every = ('s1', 's2', 's2_cloudy')
    rois = [
        ('ROIs1868_summer', 36, 32632, 500_000),
        ('ROIs1868_summer', 19, 32632, 600_000),
        ('ROIs1158_spring', 106, 32735, 400_000),
        ('ROIs2017_winter', 8, 32735, 450_000),
    ]
    for season, roi, epsg, x in rois:
        for patch in range(3):
            grid = grid_at(epsg, x + patch * STRIDE, 5_300_000)
            write_patch(module_path, season, roi, patch, grid, every)
    # One patch with a clear S2 only, one without S2, one without S1.
    write_patch(
        module_path, 'ROIs1868_summer', 36, 7, grid_at(32632, 510_000, 5_300_000), every[:2]
    )
    write_patch(
        module_path, 'ROIs1868_summer', 36, 8, grid_at(32632, 511_000, 5_300_000), every[:1]
    )
    write_patch(
        module_path, 'ROIs1868_summer', 36, 9, grid_at(32632, 512_000, 5_300_000), every[1:]
    )
    # The land-cover maps of SEN12MS may be in the same folder.
    grid = grid_at(32632, 500_000, 5_300_000)
    land_cover = np.ones((4, grid.height, grid.width), dtype='uint16')
    name = 'ROIs1868_summer_lc_36_p0.tif'
    write_raster(module_path / 'ROIs1868_summer_lc' / 'lc_36' / name, land_cover, grid)
    return module_path


names = st.builds(
    PatchName,
    season=st.sampled_from(SEASONS),
    kind=st.sampled_from(('s1', 's2', 's2_cloudy')),
    roi=st.integers(0, 300),
    patch=st.integers(0, 3000),
)


@given(names)
def test_names_are_read_as_they_are_written(name: PatchName) -> None:
    assert PatchName.parse(Path('any') / 'folder' / name.filename) == name


def test_the_names_of_the_real_set() -> None:
    assert PatchName.parse('ROIs1868_summer_s1_19_p30.tif') == PatchName(
        'ROIs1868_summer', 's1', 19, 30
    )
    cloudy = PatchName('ROIs1868_summer', 's2_cloudy', 31, 100)
    assert cloudy.filename == 'ROIs1868_summer_s2_cloudy_31_p100.tif'
    assert cloudy.folder == 'ROIs1868_summer_s2_cloudy/s2_cloudy_31'
    for name in (
        'ROIs1868_summer_s3_19_p30.tif',
        'ROIs1868_summer_s1_19_30.tif',
        'ROIs1868_s1_19_p30.tif',
        'ROIs1868_summer_s1_19_p30.tif.aux.xml',
        's1_ROIs2017_32_ImgNo_4_2018-02-28_patch_12.tif',
    ):
        assert PatchName.parse(name) is None


@pytest.mark.filterwarnings('ignore:files left out')
def test_pairs(tree: Path) -> None:
    both = SEN12MSCR(tree)
    rows = [tuple(row) for row in both.index[['season', 'roi', 'patch', 'time_step']].to_numpy()]
    summer, winter = ('ROIs1868_summer', 36), ('ROIs2017_winter', 8)
    assert rows == [
        *((*summer, patch, sky) for patch in range(3) for sky in range(2)),
        (*summer, 7, 0),
        *((*winter, patch, sky) for patch in range(3) for sky in range(2)),
    ]
    for row in both.index.itertuples():
        assert Path(row.s2).parent.name.startswith(('s2_', 's2_cloudy_')[row.time_step])
    assert len(SEN12MSCR(tree, sky='clear')) == 7
    assert len(SEN12MSCR(tree, sky='cloudy')) == 6
    assert set(both.index['epsg']) == {32632, 32735}


def test_files_without_a_partner_are_reported(tree: Path) -> None:
    with pytest.warns(UserWarning, match='S1 without S2.*S2 without S1'):
        dataset = SEN12MSCR(tree)
    # p8 has no S2; p9 has two S2 but no S1.
    assert dataset.unpaired == 3
    assert len(dataset.skipped) == 3


@pytest.mark.filterwarnings('ignore:files left out')
def test_samples_are_those_of_the_files(tree: Path) -> None:
    dataset = SEN12MSCR(tree)
    for i, row in enumerate(dataset.index.itertuples()):
        sample = dataset[i]
        with rasterio.open(row.s1) as s1, rasterio.open(row.s2) as s2:
            expected = np.concatenate([s1.read(), s2.read().astype('float32')])
            assert sample['crs'].item() == s2.crs.to_epsg()
            assert sample['bounds'].tolist() == list(s2.bounds)
        assert np.array_equal(sample['image'].numpy(), expected)
        # The names have no date.
        assert sample['dates'].tolist() == [NO_DATE, NO_DATE]


@pytest.mark.filterwarnings('ignore:files left out')
def test_a_pair_is_found_by_its_place(tree: Path) -> None:
    dataset = SEN12MSCR(tree, sky='cloudy')
    for i, row in enumerate(dataset.index.itertuples()):
        left, bottom, right, top = row.geometry.bounds
        found = dataset[left:right, bottom:top, pd.Timestamp('2018-01-01') : pd.Timestamp('2019')]
        # The bounds of a UTM patch in degrees are slightly larger than the patch.
        assert torch.equal(found['image'], dataset[i]['image'])


@pytest.mark.filterwarnings('ignore:files left out')
def test_no_ground_of_one_split_is_in_another(tree: Path) -> None:
    splits = {split: SEN12MSCR(tree, split).index for split in ('train', 'val', 'test')}
    everything = SEN12MSCR(tree, 'all').index
    assert sum(map(len, splits.values())) == len(everything)
    # Neighbours overlap, so the splits must keep them apart.
    assert everything.iloc[0].geometry.overlaps(everything.iloc[2].geometry)
    for name, index in splits.items():
        for other, other_index in splits.items():
            if name != other:
                assert not set(index['roi']) & set(other_index['roi'])
                assert not index.geometry.union_all().intersects(other_index.geometry.union_all())


def test_official_splits() -> None:
    assert (len(SEN12MSCR_VAL_ROIS), len(SEN12MSCR_TEST_ROIS)) == (10, 10)
    assert not SEN12MSCR_VAL_ROIS & SEN12MSCR_TEST_ROIS
    assert sen12mscr_split_of('ROIs1868_summer', 19) == 'val'
    assert sen12mscr_split_of('ROIs1158_spring', 31) == 'test'
    assert sen12mscr_split_of('ROIs1868_summer', 36) == 'train'
    # The same number in another season is a different place.
    assert sen12mscr_split_of('ROIs1970_fall', 19) == 'train'
    assert sen12mscr_split_of('ROIs1868_summer', 100) == 'test'


def test_no_roi_is_trained_on_in_one_set_and_held_out_in_the_other() -> None:
    seasons = {season.split('_')[0]: season for season in SEASONS}
    for season, rois in ROIS.items():
        for roi in rois:
            here, there = sen12mscr_split_of(seasons[season], roi), split_of(season, roi)
            # ROIs held out by SEN12MS-CR-TS are held out here, in the same split if both hold them
            # out.
            assert there in ('train', here), (season, roi)


@pytest.mark.filterwarnings('ignore:files left out')
def test_clear_and_cloudy_as_two_dates(tree: Path) -> None:
    dataset = MultiDate(SEN12MSCR(tree, 'val'), 2)
    assert len(dataset) == 3
    sample = dataset[0]
    pairs = SEN12MSCR(tree, 'val')
    skies = {tuple(pairs[i]['image'].flatten().tolist()) for i in range(2)}
    assert {tuple(image.flatten().tolist()) for image in sample['image']} == skies


def test_bad_arguments(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='grey'):
        SEN12MSCR(tree, sky='grey')  # type: ignore[arg-type]
    with pytest.raises(DatasetNotFoundError):
        SEN12MSCR(tmp_path)
    with pytest.raises(EmptySplitError, match=r"split='val'.*ROIs2017_winter/8 \(train\)"):
        SEN12MSCR(tree / 'ROIs2017_winter_s1', 'val')


# -- real files -----------------------------------------------------------------------------------


def link(root: Path, source: Path, name: PatchName) -> Path:
    path = root / name.folder / name.filename
    path.parent.mkdir(parents=True)
    path.symlink_to(source)
    return path


def test_real_files_are_read_bit_for_bit(shared_data: Path, tmp_path: Path) -> None:
    """Real S2, clear and cloudy, with their names. S1 is generated, as the samples have none."""
    files = shared_data / 'real' / 'sen12mscr_pairs_oriolac'
    sources = sorted(files.rglob('ROIs1868_summer_s2*.tif'))
    assert len(sources) == 2
    with rasterio.open(sources[0]) as src:
        grid = Grid.of(src)
    name = PatchName('ROIs1868_summer', 's1', 31, 100)
    s1 = random_pixels('s1', grid, 0)
    write_raster(tmp_path / name.filename, s1, grid)
    dataset = SEN12MSCR([tmp_path, files / 's2', files / 's2_cloudy'])
    assert len(dataset) == 2
    assert set(dataset.index['epsg']) == {32651}
    for i in range(2):
        sample = dataset[i]
        assert sample['image'].shape == (15, 256, 256)
        with rasterio.open(dataset.index.iloc[i]['s2']) as src:
            pixels = src.read()
            assert pixels.dtype == np.uint16
            assert tuple(sample['transform'].tolist()) == tuple(src.transform)[:6]
        assert np.array_equal(sample['image'][2:].numpy(), pixels)
        assert np.array_equal(sample['image'][:2].numpy(), s1)
        assert sample['valid'].all()


def test_real_s1_alone_makes_no_pair(shared_data: Path) -> None:
    files = shared_data / 'real' / 'sen12mscr_pairs_oriolac'
    with (
        pytest.warns(UserWarning, match='1 S1 without S2'),
        pytest.raises(EmptySplitError, match=r'ROIs1158_spring/100 \(train\)'),
    ):
        SEN12MSCR(files / 's1')


def test_real_triplet(shared_data: Path, tmp_path: Path) -> None:
    """ROIs1970_fall 139, patch 839, which is among the real trees under another name."""
    source = shared_data / 'real' / 'crts_layout' / 'ROIs2017' / '22'
    (clear,), (cloudy,) = ((source / 'S2' / str(t)).glob('*.tif') for t in range(2))
    (s1,) = (source / 'S1' / '0').glob('*.tif')
    for kind, file in (('s1', s1), ('s2', clear), ('s2_cloudy', cloudy)):
        link(tmp_path, file.resolve(), PatchName('ROIs1970_fall', kind, 139, 839))
    dataset = SEN12MSCR(tmp_path, 'test')
    assert len(dataset) == 2
    for i, s2 in enumerate((clear, cloudy)):
        with rasterio.open(s1) as a, rasterio.open(s2) as b:
            expected = np.concatenate([a.read(), b.read().astype('float32')])
        assert np.array_equal(dataset[i]['image'].numpy(), expected)


def test_overlap_of_neighbours_is_that_of_the_real_set() -> None:
    """Bounds of p139 and p140 of ROIs1970_fall 136, from the real files."""
    grids = [
        Grid(CRS.from_epsg(32639), Affine(10, 0, left, 0, -10, 6101701.16275), 256, 256)
        for left in (592975.26603, 594255.26603)
    ]
    shared = grids[0].footprint().intersection(grids[1].footprint())
    assert shared.area == pytest.approx(grids[0].footprint().area / 2)
    assert sen12mscr_split_of('ROIs1970_fall', 136) == 'train'
