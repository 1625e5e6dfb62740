"""Pairs must overlap on the ground, independent of their names."""

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from rasterio.transform import Affine

from geofm.cli import main
from geofm.datasets import SEN12MSCR, SEN12MSCRTS, EmptySplitError, write_sample_data
from geofm.datasets.catalogue.scenes import Grids
from geofm.datasets.pairs.skipped import Reason
from geofm.datasets.pairs.table import PAIR, overlaps
from geofm.grid import Grid
from geofm.sen12ms import PairKey
from tests.datasets.tree import SIZE, grid_at, write_scene

KEY = PairKey('ROIs1868', 36, 0, 0)
DAY = date(2018, 2, 28)

#: Grids of an S2 patch: in degrees as in the real data set, in metres, south-up, and rotated.
GRIDS = {
    'degrees': grid_at(4326, 11.5, 48.1),
    'utm': grid_at(32632, 500000, 5300000),
    'south-up': Grid(grid_at(32632, 0, 0).crs, Affine(10, 0, 500000, 0, 10, 5300000), SIZE, SIZE),
    'rotated': Grid(
        grid_at(32632, 0, 0).crs,
        Affine.translation(500000, 5300000) @ Affine.rotation(30) @ Affine.scale(10, -10),
        SIZE,
        SIZE,
    ),
}

#: Fraction of the S2 patch that is covered by an S1 shifted along the columns by so many pixels.
SHIFTS = {0.0: 1.0, 0.4: 1 - 0.4 / SIZE, 1.0: 1 - 1 / SIZE, SIZE / 2: 0.5, SIZE: 0.0, 600.0: 0.0}


def write_moved(root: Path, grid: Grid, shift: float, key: PairKey = KEY) -> None:
    """Write a pair whose S1 is shifted by *shift* pixels along the columns."""
    write_scene(root, 's2', key, grid, DAY)
    moved = Grid(grid.crs, grid.transform @ Affine.translation(shift, 0), SIZE, SIZE)
    write_scene(root, 's1', key, moved, DAY)


def by_name(root: Path, **kwargs: float) -> SEN12MSCRTS:
    return SEN12MSCRTS(root, split='all', **kwargs)  # type: ignore[arg-type]


def by_date(root: Path, **kwargs: float) -> SEN12MSCRTS:
    return SEN12MSCRTS(root, split='all', pairing='nearest', **kwargs)  # type: ignore[arg-type]


def by_list(root: Path, **kwargs: float) -> SEN12MSCRTS:
    pairs = [sorted(map(str, root.rglob(f'*_patch_{patch}.tif'))) for patch in (0, 1)]
    (root / 'pairs.json').write_text(json.dumps([pair for pair in pairs if pair]))
    return SEN12MSCRTS(root / 'pairs.json', split='all', **kwargs)  # type: ignore[arg-type]


WAYS = [by_name, by_date, by_list]


@pytest.mark.filterwarnings('ignore:files left out', 'ignore:.*only part of the S2')
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('grid', GRIDS.values(), ids=list(GRIDS))
@pytest.mark.parametrize(('shift', 'covered'), SHIFTS.items())
def test_a_moved_s1_is_marked_or_left_out(
    tmp_path: Path, way: type, grid: Grid, shift: float, covered: float
) -> None:
    write_moved(tmp_path, grid, shift)
    far = Grid(grid.crs, grid.transform @ Affine.translation(5 * SIZE, 0), SIZE, SIZE)
    write_moved(tmp_path, far, 0, KEY._replace(patch=1))
    ds = way(tmp_path)
    if covered < 0.5:
        assert ds.index['patch'].tolist() == [1]
        (gone,) = ds.skipped.files[Reason.APART]
        assert Path(gone).name.startswith('s1_')
        assert 'patch_0' in gone
        return
    assert ds.index['overlap'].tolist() == pytest.approx([covered, 1])
    assert (ds.index['overlap'].iloc[0] == 1) == (shift == 0)
    # Columns that are not covered by S1 are not valid.
    valid = ds[0]['valid'].numpy()
    columns = valid.all(axis=0)
    assert (valid == columns).all()
    assert columns.sum() == pytest.approx(covered * SIZE, abs=1)


@pytest.mark.parametrize('way', WAYS)
def test_partial_overlap_warns(tmp_path: Path, way: type) -> None:
    write_moved(tmp_path, GRIDS['utm'], SIZE / 4)
    with pytest.warns(UserWarning, match=r'1 of 1 pairs.*only part.*75\.0%, .*s1_'):
        way(tmp_path)


def test_patches_crossed_in_a_pair_list_are_left_out(tmp_path: Path) -> None:
    for patch in range(3):
        grid = grid_at(32632, 500000 + 6000 * patch, 5300000)
        write_moved(tmp_path, grid, 0, KEY._replace(patch=patch))
    s1, s2 = (sorted(map(str, tmp_path.rglob(f'{sensor}_*.tif'))) for sensor in ('s1', 's2'))
    pairs = [[s1[1], s2[0]], [s1[0], s2[1]], [s1[2], s2[2]]]
    (tmp_path / 'pairs.json').write_text(json.dumps(pairs))
    with pytest.warns(UserWarning, match='2 S1 and S2 overlap too little'):
        ds = SEN12MSCRTS(tmp_path / 'pairs.json', split='all')
    assert ds.index['patch'].tolist() == [2]


@pytest.mark.filterwarnings('ignore:files left out', 'ignore:.*only part of the S2')
def test_min_overlap_can_be_set(tmp_path: Path) -> None:
    write_moved(tmp_path, GRIDS['utm'], SIZE / 4)
    assert len(by_name(tmp_path, min_overlap=0.75)) == 1
    with pytest.raises(ValueError, match='overlap too little'):
        by_name(tmp_path, min_overlap=0.76)
    with pytest.raises(ValueError, match='from 0 to 1, not 75'):
        by_name(tmp_path, min_overlap=75)


def test_pairs_of_sen12mscr_must_overlap_too(tmp_path: Path) -> None:
    source = tmp_path / 'source'
    write_moved(source, GRIDS['utm'], 600)
    write_moved(source, grid_at(32632, 520000, 5300000), 0, KEY._replace(patch=1))
    for path in source.rglob('*.tif'):
        sensor, patch = path.name[:2], path.stem[-1]
        name = f'ROIs1868_summer_{sensor}/{sensor}_36/ROIs1868_summer_{sensor}_36_p{patch}.tif'
        (tmp_path / 'cr' / name).parent.mkdir(parents=True, exist_ok=True)
        path.rename(tmp_path / 'cr' / name)
    with pytest.warns(UserWarning, match='1 S1 and S2 overlap too little'):
        ds = SEN12MSCR(tmp_path / 'cr', split='all')
    assert ds.index['patch'].tolist() == [1]


def test_index_names_pairs_of_different_ground(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_moved(tmp_path, GRIDS['degrees'], 600)
    write_moved(tmp_path, grid_at(4326, 12.5, 48.1), SIZE / 4, KEY._replace(patch=1))
    pairs = tmp_path.parent / f'{tmp_path.name}.json'
    main(['index', str(tmp_path), '--pairs-json', str(pairs)])
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith('left out')]
    assert 's1_ROIs1868_36_ImgNo_0_2018-02-28_patch_0.tif' in line
    assert '50%' in line
    assert '1 of 1 pairs' in said
    assert '75.0%' in said
    ((s1, _),) = json.loads(pairs.read_text())
    assert 'patch_1' in s1


@given(
    st.tuples(*[st.floats(-2 * SIZE, 2 * SIZE)] * 2),
    st.floats(0, 360),
    st.floats(0.25, 4),
    st.sampled_from(sorted(GRIDS)),
)
def test_overlap_is_the_fraction_of_pixels_covered(
    shift: tuple[float, float], angle: float, scale: float, name: str
) -> None:
    # Reference: count the centres of a grid of 4 x 4 points per pixel that fall inside the file.
    grid = GRIDS[name]
    local = Affine.translation(*shift) @ Affine.rotation(angle) @ Affine.scale(scale)
    centres = (np.arange(4 * SIZE) + 0.5) / 4
    cols, rows = ~local @ np.meshgrid(centres, centres)
    want = ((cols > 0) & (cols < SIZE) & (rows > 0) & (rows < SIZE)).mean()
    pair = np.zeros(1, PAIR)
    pair['transform'], pair['epsg'] = tuple(grid.transform)[:6], grid.crs.to_epsg()
    pair['height'] = pair['width'] = SIZE
    file = Grids(
        0,
        pair['epsg'].astype(np.int32),
        np.array([tuple(grid.transform @ local)[:6]]),
        np.array([[SIZE, SIZE]], np.int32),
    )
    assert overlaps(file, pair)[0] == pytest.approx(want, abs=0.03)


def test_overlap_across_crs() -> None:
    # The same ground in the UTM zone of the place and in the neighbouring one.
    grid = GRIDS['utm']
    pair = np.zeros(1, PAIR)
    pair['transform'], pair['epsg'] = tuple(grid.transform)[:6], 32632
    pair['height'] = pair['width'] = SIZE
    for zone, east, want in ((32633, 0, 1.0), (32633, 5 * SIZE * 10, 0.0)):
        corners = grid.footprint(grid_at(zone, 0, 0).crs).bounds
        side = 10.0 * SIZE * 2
        left, top = corners[0] - side / 4 + east, corners[3] + side / 4
        file = Grids(
            0,
            np.array([zone], np.int32),
            np.array([[10.0, 0, left, 0, -10.0, top]]),
            np.array([[2 * SIZE, 2 * SIZE]], np.int32),
        )
        assert overlaps(file, pair)[0] == pytest.approx(want, abs=1e-6)


def check_moved_tree(tree: Path, tmp_path: Path) -> None:
    """Every S1 that is shifted by 0.6 px or more is marked or left out, for any pairing."""
    for shift in (0.6, -3.5, 24.0, 5000.0):
        root = tmp_path / f'moved by {shift}'
        shutil.copytree(tree, root)
        for path in root.rglob('s1_*.tif'):
            path.chmod(0o644)
            with rasterio.open(path, 'r+') as dst:
                dst.transform @= Affine.translation(shift, 0)
        listed = root / 'pairs.json'
        by_time = SEN12MSCRTS(tree, split='all').index[['s1', 's2']].to_numpy()
        pairs = [[str(root / Path(path).relative_to(tree)) for path in pair] for pair in by_time]
        listed.write_text(json.dumps(pairs))
        for paths, pairing in ((root, 'time_step'), (root, 'nearest'), (listed, 'time_step')):
            kwargs: dict[str, Any] = {'split': 'all', 'pairing': pairing}
            if shift == 5000:
                with pytest.raises(EmptySplitError, match='overlap too little'):
                    SEN12MSCRTS(paths, **kwargs)
                continue
            ds = SEN12MSCRTS(paths, **kwargs)
            assert len(ds) == len(by_time)
            assert (ds.index['overlap'] < 1).all()
            for i in range(0, len(ds), 4):
                assert not ds[i]['valid'].all()


@pytest.mark.filterwarnings('ignore:files left out', 'ignore:.*only part of the S2')
def test_no_moved_pair_of_generated_data_passes_unmarked(tmp_path: Path) -> None:
    write_sample_data(tmp_path / 'tree', [('ROIs1868', 36)], 4, 2, size=64)
    check_moved_tree(tmp_path / 'tree', tmp_path)


@pytest.mark.filterwarnings('ignore:files left out', 'ignore:.*only part of the S2')
def test_no_moved_pair_of_real_data_passes_unmarked(shared_data: Path, tmp_path: Path) -> None:
    check_moved_tree(shared_data / 'real' / 'crts_layout', tmp_path)
