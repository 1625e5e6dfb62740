"""Splits for training, validation and testing, none of which shows ground of another."""

import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from rich.progress import track

from geofm.atomic import atomic_folder
from geofm.datasets.catalogue.scan import folders_below
from geofm.printing import warn
from geofm.sen12ms import PatchName, Roi, SceneName, sen12mscr_split_of, split_of

#: Names of the splits, and of the folders of a tree.
SPLITS = ('train', 'val', 'test')

# Land-cover maps go with the ROI that they show.
_LAND_COVER = (
    re.compile(r'lc_(ROIs\d{4})_(\d+)_patch_\d+\.tif', re.ASCII),
    re.compile(r'(ROIs\d{4}_[a-z]+)_lc_(\d+)_p\d+\.tif', re.ASCII),
)


def roi_of(path: str | os.PathLike[str]) -> Roi | None:
    """ROI that a file shows, by its name.

    Args:
        path: Path of a scene or land-cover map of either data set.

    Returns:
        Season (as in the name) and number, or None for other names.
    """
    scene = SceneName.parse(path)
    if scene is not None:
        return scene.key.season, scene.key.roi
    patch = PatchName.parse(path)
    if patch is not None:
        return patch.season, patch.roi
    for pattern in _LAND_COVER:
        match = pattern.fullmatch(Path(path).name)
        if match is not None:
            return match[1], int(match[2])
    return None


def official_splits(rois: Iterable[Roi]) -> dict[Roi, str]:
    """Splits after the official lists.

    Args:
        rois: ROIs of either data set.

    Returns:
        'train', 'val' or 'test' for each of them.
    """
    return {roi: (sen12mscr_split_of if '_' in roi[0] else split_of)(*roi) for roi in rois}


def random_splits(rois: Iterable[Roi], val: float, test: float, seed: int) -> dict[Roi, str]:
    """Splits drawn at random.

    Args:
        rois: ROIs of either data set. The same number and seed of season is the same place in
            both, so these stay together.
        val: Fraction of the ROIs, 0 to 1, for validation; rounded to the nearest number of ROIs,
            but at least one if it is not 0.
        test: Share for testing.
        seed: Seed.

    Returns:
        'train', 'val' or 'test' for each of them.

    Raises:
        ValueError: If a share is not from 0 to 1, or nothing is left to train on.
    """
    check_shares(val, test)
    rois = list(rois)
    places = sorted({_place(roi) for roi in rois})
    order = np.random.default_rng(seed).permutation(len(places))
    counts = [
        max(1, math.floor(share * len(places) + 0.5)) if share else 0 for share in (val, test)
    ]
    if sum(counts) >= len(places):
        raise ValueError(
            f'val={val} and test={test} of {len(places)} ROIs leave none to train on: ask for less'
        )
    names = ['val'] * counts[0] + ['test'] * counts[1]
    drawn = {places[i]: name for i, name in zip(order, names, strict=False)}
    return {roi: drawn.get(_place(roi), 'train') for roi in rois}


#: By the column ``split`` of the table, by place, or by blocks on the ground.
SplitBy = Literal['column', 'place', 'blocks']


@dataclass(frozen=True)
class SplitRule:
    """How the samples of a table of rasters are split.

    Attributes:
        by: 'column': by the column ``split`` of the table; 'place': all dates and windows of a
            place together, and places that overlap on the ground too; 'blocks': by square blocks on
            the ground, without the samples that cross into a block of another split.
        val: Fraction of the samples, 0 to 1, for validation; about that, since places and blocks
            stay whole, but at least one of them if it is not 0.
        test: Share for testing.
        seed: Seed of the draw.
        block_km: Side of the blocks in kilometres.
    """

    by: SplitBy = 'place'
    val: float = 0.1
    test: float = 0.1
    seed: int = 0
    block_km: float = 20.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If one is out of range.
        """
        if self.by not in get_args(SplitBy):
            raise ValueError(
                f"split by '{self.by}' is unknown: choose from {list(get_args(SplitBy))}"
            )
        check_shares(self.val, self.test)


def check_shares(val: float, test: float) -> None:
    """Check shares for validation and testing.

    Args:
        val: Share for validation.
        test: Share for testing.

    Raises:
        ValueError: If one is not from 0 to 1.
    """
    if not (0 <= val <= 1 and 0 <= test <= 1):
        raise ValueError(f'val and test must be shares from 0 to 1, not {val} and {test}')


def draw_groups(
    order: npt.NDArray[Any], weights: npt.NDArray[Any], val: float, test: float
) -> npt.NDArray[np.int8]:
    """Deal groups of samples out to the splits.

    Args:
        order: A number of each group that the draw goes by, such as a hash of its name and the
            seed, shape (G,). A group keeps its number when others are added, so that splits of a
            growing archive hardly change.
        weights: Number of samples in each group, shape (G,).
        val: Fraction of the samples for validation.
        test: Fraction of the samples for testing.

    Returns:
        Position in :data:`SPLITS` for each group, int8 (G,).

    Raises:
        ValueError: If nothing is left to train on.
    """
    ranked = np.argsort(order, kind='stable')
    # A group goes to the split in whose share its middle lies.
    middle = (np.cumsum(weights[ranked]) - weights[ranked] / 2) / max(weights.sum(), 1)
    needed = int(val > 0) + int(test > 0)
    if len(order) <= needed:
        raise ValueError(
            f'val={val} and test={test} of {len(order)} groups of samples leave none to train on '
            '(places that overlap on the ground are one group): split by smaller blocks, such as '
            f'{{by: blocks, block_km: 1, val: {val}, test: {test}}}, or hold nothing back with '
            'val: 0 and test: 0'
        )
    # One group at least for each split that is asked for, and for training.
    n_val = max(int((middle < val).sum()), int(val > 0))
    n_val = min(n_val, len(order) - 1 - int(test > 0))
    n_test = max(int((middle < val + test).sum()) - n_val, int(test > 0))
    n_test = min(n_test, len(order) - 1 - n_val)
    codes = np.zeros(len(order), np.int8)
    codes[ranked[:n_val]] = SPLITS.index('val')
    codes[ranked[n_val : n_val + n_test]] = SPLITS.index('test')
    return codes


def split_tree(
    root: Path,
    dest: Path,
    copy: bool = False,
    shares: tuple[float, float] | None = None,
    seed: int = 0,
) -> Counter[str]:
    """Write the folders ``train``, ``val`` and ``test`` with the files of a tree.

    Args:
        root: The tree.
        dest: Folder to write; it must not exist. It is whole, or not there at all.
        copy: Whether to copy the files rather than to link to them.
        shares: Fractions of ROIs for validation and testing, drawn at random; by default, the
            official lists.
        seed: Seed of the draw.

    Returns:
        Number of files of each split.

    Raises:
        ValueError: If *dest* exists or lies in the tree, there is no scene, or the shares are no
            shares.
    """
    root, dest = root.resolve(), dest.absolute()
    if dest.exists() or dest.is_symlink():
        raise ValueError(f'{dest}: exists already; delete it or name another folder')
    if dest.parent.resolve().is_relative_to(root):
        raise ValueError(f'{dest}: lies in the tree that is to be split; name a folder outside')
    found = {path: roi for path in _rasters(root) if (roi := roi_of(path)) is not None}
    files = {path: roi for path, roi in found.items() if os.path.isfile(path)}  # noqa: PTH113
    if odd := [path for path in found if path not in files]:
        warn(f'left out: {len(odd)} entries that are no files (broken links, pipes), e.g. {odd[0]}')
    if not files:
        raise ValueError(f'{root}: no scene of SEN12MS-CR-TS or SEN12MS-CR')
    rois = sorted(set(files.values()))
    splits = official_splits(rois) if shares is None else random_splits(rois, *shares, seed)
    with atomic_folder(dest) as part:
        for path, roi in track(files.items(), description='Splitting', disable=len(files) < 2000):
            target = part / splits[roi] / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if copy:
                shutil.copy2(path, target)
            else:
                target.symlink_to(path.resolve())
        for name in SPLITS:
            (part / name).mkdir(exist_ok=True)
    return Counter(dict.fromkeys(SPLITS, 0) | Counter(splits[roi] for roi in files.values()))


def _place(roi: Roi) -> Roi:
    """ROI under the name that both data sets share: without the season's name."""
    return roi[0].split('_')[0], roi[1]


def _rasters(root: Path) -> list[Path]:
    """Rasters of a tree, in order."""
    found = []
    for folder, _, entries in folders_below(root):
        if entries is None:
            raise PermissionError(f'{root / folder}: no permission to read')
        names = (entry.name for entry in entries)
        found += [
            root / folder / name
            for name in names
            if name.endswith('.tif') and not name.startswith('.')
        ]
    return sorted(found)
