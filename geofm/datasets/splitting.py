"""Training, validation and test splits that do not share ground."""

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

#: A split, or all samples.
Split = Literal['train', 'val', 'test', 'all']

#: Names of the splits, and of their folders.
SPLITS = ('train', 'val', 'test')

# Land-cover maps belong to the split of their ROI.
_LAND_COVER = (
    re.compile(r'lc_(ROIs\d{4})_(\d+)_patch_\d+\.tif', re.ASCII),
    re.compile(r'(ROIs\d{4}_[a-z]+)_lc_(\d+)_p\d+\.tif', re.ASCII),
)


def roi_of(path: str | os.PathLike[str]) -> Roi | None:
    """Return the ROI of a file from its name.

    Args:
        path: Path of a scene or land-cover map of SEN12MS-CR-TS or SEN12MS-CR.

    Returns:
        Season (as in the name) and number; None for other names.
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
    """Return the official splits of ROIs.

    Args:
        rois: ROIs of SEN12MS-CR-TS or SEN12MS-CR.

    Returns:
        'train', 'val' or 'test' for each ROI.
    """
    return {roi: (sen12mscr_split_of if '_' in roi[0] else split_of)(*roi) for roi in rois}


def random_splits(rois: Iterable[Roi], val: float, test: float, seed: int) -> dict[Roi, str]:
    """Draw splits at random.

    Args:
        rois: ROIs of SEN12MS-CR-TS or SEN12MS-CR. Two ROIs, one of each data set, are
            one place and get the same split if they have the same season (such as ROIs1158 and
            ROIs1158_spring) and the same number.
        val: Fraction of the ROIs for validation, 0 to 1, rounded to the nearest number of ROIs. If
            it is not 0, at least one ROI is used.
        test: Fraction for the test split.
        seed: Seed.

    Returns:
        'train', 'val' or 'test' for each ROI.

    Raises:
        ValueError: If a fraction is not from 0 to 1, or nothing is left for training.
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
            f'val={val} and test={test} of {len(places)} ROIs leave none for training: lower them'
        )
    names = ['val'] * counts[0] + ['test'] * counts[1]
    drawn = {places[i]: name for i, name in zip(order, names, strict=False)}
    return {roi: drawn.get(_place(roi), 'train') for roi in rois}


#: Split by the column ``split`` of the table, by place, or by blocks on the ground.
SplitBy = Literal['column', 'place', 'blocks']


@dataclass(frozen=True)
class SplitRule:
    """Rule by which the samples of a table of rasters are split.

    Attributes:
        by: 'column' uses the column ``split`` of the table. 'place' keeps all dates and windows of
            a place together, and also places that overlap on the ground. 'blocks' uses square
            blocks on the ground, and leaves out samples that extend into a block of another split.
        val: Fraction of the samples for validation, 0 to 1. It is approximate, as places and blocks
            are not divided. If it is not 0, at least one place or block is used.
        test: Fraction for the test split.
        seed: Random seed.
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
            raise ValueError(f"unknown split by '{self.by}': choose from {list(get_args(SplitBy))}")
        check_shares(self.val, self.test)


def check_shares(val: float, test: float) -> None:
    """Check the fractions for validation and test.

    Args:
        val: Fraction for validation.
        test: Fraction for the test split.

    Raises:
        ValueError: If a fraction is not from 0 to 1.
    """
    if not (0 <= val <= 1 and 0 <= test <= 1):
        raise ValueError(f'val and test must be fractions from 0 to 1, not {val} and {test}')


def draw_groups(
    order: npt.NDArray[Any], weights: npt.NDArray[Any], val: float, test: float
) -> npt.NDArray[np.int8]:
    """Assign groups of samples to the splits.

    Args:
        order: Number by which the groups are ordered, shape (G,), such as a hash of name and seed.
            It does not change when other groups are added, so that the splits of a growing archive
            hardly change.
        weights: Number of samples in each group, shape (G,).
        val: Fraction of the samples for validation.
        test: Fraction of the samples for testing.

    Returns:
        Index into :data:`SPLITS` for each group, int8 (G,).

    Raises:
        ValueError: If nothing is left for training.
    """
    ranked = np.argsort(order, kind='stable')
    # A group belongs to the split whose fraction contains the middle of the group.
    middle = (np.cumsum(weights[ranked]) - weights[ranked] / 2) / max(weights.sum(), 1)
    needed = int(val > 0) + int(test > 0)
    if len(order) <= needed:
        raise ValueError(
            f'val={val} and test={test} of {len(order)} groups of samples leave none for training '
            '(places that overlap on the ground are one group): split by smaller blocks, such as '
            f'{{by: blocks, block_km: 1, val: {val}, test: {test}}}, or hold out nothing with '
            'val: 0 and test: 0'
        )
    # Each requested split and training get at least one group.
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
        root: Root folder of the tree.
        dest: Folder to write, which must not exist. It is written atomically.
        copy: Whether to copy the files instead of linking to them.
        shares: Fractions of the ROIs for validation and test, drawn at random. Default: the
            official splits.
        seed: Random seed.

    Returns:
        Number of files per split.

    Raises:
        ValueError: If *dest* exists or is in the tree, the tree has no scene, or a fraction is out
            of range.
    """
    root, dest = root.resolve(), dest.absolute()
    if dest.exists() or dest.is_symlink():
        raise ValueError(f'{dest}: already exists; delete it or choose another folder')
    if dest.parent.resolve().is_relative_to(root):
        raise ValueError(f'{dest}: is in the tree to be split; choose a folder outside')
    found = {path: roi for path in _rasters(root) if (roi := roi_of(path)) is not None}
    files = {path: roi for path, roi in found.items() if os.path.isfile(path)}  # noqa: PTH113
    if odd := [path for path in found if path not in files]:
        warn(
            f'left out: {len(odd)} entries that are not files (broken links, pipes), e.g. {odd[0]}',
        )
    if not files:
        raise ValueError(f'{root}: no scene of SEN12MS-CR-TS or SEN12MS-CR found')
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
    """Return a ROI under the name that both data sets share, without the name of the season."""
    return roi[0].split('_')[0], roi[1]


def _rasters(root: Path) -> list[Path]:
    """Return the sorted rasters of a tree."""
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
