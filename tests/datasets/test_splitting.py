import os
import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from geofm.datasets import SEN12MSCR, SEN12MSCRTS
from geofm.datasets.splitting import random_splits, roi_of, split_tree
from geofm.sen12ms import ROIS, PatchName
from tests.datasets.tree import SIZE, grid_at, random_pixels, write_raster
from tests.killing import killed_before_rename

ALL = [(season, roi) for season, rois in ROIS.items() for roi in rois]


def rois_in(folder: Path) -> set[object]:
    return {roi_of(path) for path in folder.rglob('*.tif')}


def test_official_splits_are_those_of_the_dataset(tree: Path, tmp_path: Path) -> None:
    counts = split_tree(tree, tmp_path / 'out')
    for name in ('train', 'val', 'test'):
        files = {path.name for path in (tmp_path / 'out' / name).rglob('*.tif')}
        ds = SEN12MSCRTS(tree, name)
        assert files == {Path(p).name for p in [*ds.index['s1'], *ds.index['s2']]}
        assert counts[name] == len(files)
    links = list((tmp_path / 'out').rglob('*.tif'))
    assert all(link.is_symlink() and link.resolve().is_relative_to(tree) for link in links)
    # The split folders can be opened as data sets.
    assert len(SEN12MSCRTS(tmp_path / 'out' / 'train', 'all')) == len(SEN12MSCRTS(tree))


def test_copies(tree: Path, tmp_path: Path) -> None:
    split_tree(tree, tmp_path / 'out', copy=True)
    for path in (tmp_path / 'out').rglob('*.tif'):
        assert not path.is_symlink()
        source = tree / Path(*path.relative_to(tmp_path / 'out').parts[1:])
        assert path.read_bytes() == source.read_bytes()


def test_land_cover_maps_are_in_the_split_of_their_roi(tree: Path, tmp_path: Path) -> None:
    classes = np.zeros((1, SIZE, SIZE), 'uint8')
    name = 'ROIs2017/22/LC/lc_ROIs2017_22_patch_2.tif'
    lc = write_raster(tmp_path / 'in' / name, classes, grid_at(32632, 700000, 5300000))
    split_tree(lc.parents[3], tmp_path / 'out')
    assert (tmp_path / 'out' / 'val' / name).exists()


def test_overlapping_patches_of_sen12mscr_stay_together(tmp_path: Path) -> None:
    for roi in range(6):
        for patch in range(3):
            grid = grid_at(32632, 400000 + 5000 * roi + SIZE * 5 * patch, 5300000)
            for kind in ('s1', 's2'):
                file = PatchName('ROIs1868_summer', kind, roi, patch)
                pixels = random_pixels(kind, grid, patch)
                write_raster(tmp_path / 'in' / file.folder / file.filename, pixels, grid)
    split_tree(tmp_path / 'in', tmp_path / 'out', shares=(0.2, 0.2), seed=3)
    ground = {}
    for name in ('train', 'val', 'test'):
        index = SEN12MSCR(tmp_path / 'out' / name, 'all').index
        ground[name] = shapely.union_all(index.geometry.to_numpy())
    assert not any(a.intersects(b) for a, b in combinations(ground.values(), 2))


@given(st.sets(st.sampled_from(ALL), min_size=10), st.integers(0, 99))
def test_no_roi_is_in_two_splits(rois: set[tuple[str, int]], seed: int) -> None:
    both = sorted(rois | {(f'{season}_any', roi) for season, roi in rois})
    splits = random_splits(both, 0.1, 0.3, seed)
    assert splits == random_splits(both, 0.1, 0.3, seed)
    for season, roi in rois:
        assert splits[season, roi] == splits[f'{season}_any', roi]
    counts = Counter(splits[roi] for roi in rois)
    assert counts['val'] == max(1, int(0.1 * len(rois) + 0.5))
    assert counts['test'] == int(0.3 * len(rois) + 0.5)


def test_seeds_differ() -> None:
    assert random_splits(ALL, 0.2, 0.2, 0) != random_splits(ALL, 0.2, 0.2, 1)


def test_bad_arguments(tree: Path, tmp_path: Path) -> None:
    (tmp_path / 'there').mkdir()
    for dest, message in ((tmp_path / 'there', 'exists'), (tree / 'out', 'is in the tree')):
        with pytest.raises(ValueError, match=message):
            split_tree(tree, dest)
    with pytest.raises(ValueError, match='no scene'):
        split_tree(tmp_path / 'there', tmp_path / 'out')
    with pytest.raises(ValueError, match='none for training'):
        split_tree(tree, tmp_path / 'out', shares=(0.5, 0.5))
    with pytest.raises(ValueError, match='0 to 1'):
        split_tree(tree, tmp_path / 'out', shares=(1.5, 0))
    assert not (tmp_path / 'out').exists()
    assert rois_in(tmp_path) == set()


def test_links_are_followed_once_and_odd_files_named(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / 'in'
    shutil.copytree(tree, root)
    scene = min(root.rglob('s1_*.tif'))
    counts = split_tree(root, tmp_path / 'before')
    (scene.parent / 'loop').symlink_to(root)
    (root / 'again').symlink_to(scene.parents[2])
    (root / 'itself').symlink_to('itself')
    stem = scene.stem.rpartition('_')[0]
    os.mkfifo(scene.with_name(f'{stem}_90.tif'))
    scene.with_name(f'{stem}_91.tif').symlink_to(f'{stem}_91.tif')
    for copy in (False, True):
        with pytest.warns(UserWarning, match=rf'2 entries that are not files.*{stem}_90.tif'):
            assert split_tree(root, tmp_path / f'out{copy}', copy) == counts


def test_the_copy_of_a_killed_split_is_removed_by_the_next(tree: Path, tmp_path: Path) -> None:
    killed_before_rename(lambda: split_tree(tree, tmp_path / 'out', copy=True))
    assert [p.name[:5] for p in tmp_path.iterdir()] == ['.out.'] * 2
    split_tree(tree, tmp_path / 'out', copy=True)
    assert [p.name for p in tmp_path.iterdir()] == ['out']
