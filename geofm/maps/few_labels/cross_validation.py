"""Accuracy of a map from a few labels: cross-validation by blocks of ground, and its baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rasterio.transform import Affine
from sklearn.model_selection import GroupKFold

from geofm import lonlat
from geofm.datasets.archive import Blocks
from geofm.evaluation import Accuracy, Confusions
from geofm.evaluation.backbones import band_statistics_encoder
from geofm.grid import Grid
from geofm.legend import Legend
from geofm.maps.few_labels.heads import Head, Method
from geofm.maps.make.windows import Floats
from geofm.maps.scene import Scene
from geofm.sensors import bands_of

#: Most folds of the cross-validation.
FOLDS = 5


def blocks_of(
    grid: Grid, rows: npt.NDArray[np.intp], cols: npt.NDArray[np.intp], size: float
) -> npt.NDArray[np.intp]:
    """Block of ground of patches, the same for all scenes.

    Args:
        grid: Grid of the patches.
        rows: Rows (N,).
        cols: Columns (N,).
        size: Side of a block in km.

    Returns:
        Code of the block of each patch's centre (N, 1), as of
        :class:`geofm.datasets.archive.blocks.Blocks`.
    """
    places = grid.transform @ (cols + 0.5, rows + 0.5)
    lon, lat = lonlat.transform_to_lonlat(grid, *places).T
    lon = lonlat.wrap(lon)
    codes, starts = Blocks(size).touched(np.stack([lon, lat, lon, lat], axis=1))
    return codes[starts, None].astype(np.intp)


def folds_of(blocks: npt.NDArray[np.intp]) -> list[tuple[npt.NDArray[np.intp], ...]]:
    """Folds whose training and test samples lie in different blocks.

    Args:
        blocks: Block of each sample (N, 1).

    Returns:
        Indices to train on and to test on, for each fold; none if all lie in one block.
    """
    _, groups = np.unique(blocks, axis=0, return_inverse=True)
    groups = groups.reshape(-1)
    count = len(np.unique(groups))
    if count < 2:
        return []
    return list(GroupKFold(min(FOLDS, count)).split(groups, groups=groups))


def cross_validate(
    method: Method,
    vectors: Floats,
    values: npt.NDArray[np.uint8],
    blocks: npt.NDArray[np.intp],
    legend: Legend,
    size: float,
    seed: int = 0,
) -> Accuracy | None:
    """Classify the samples of each fold by those of the others.

    Args:
        method: How to classify.
        vectors: Embeddings or other features (N, D).
        values: Class of each (N,).
        blocks: Block of each (N, 1).
        legend: The classes.
        size: Side of a block in km, for the report.
        seed: Seed of the intervals.

    Returns:
        The accuracy over all samples; None if they lie in one block.
    """
    confusions = Confusions(legend, unit='patches', side=f'{size:g} km')
    folds = folds_of(blocks)
    for train, test in folds:
        known = np.unique(values[train])
        if len(known) < 2:
            guess = np.full(len(test), known[0], np.uint8)
        else:
            guess = Head.fit(method, vectors[train], values[train], legend).predict(vectors[test])
        confusions.add_samples(guess, values[test], blocks[test])
    return confusions.accuracy(seed=seed) if folds else None


def band_statistics(
    files: Mapping[str, Path],
    grid: Grid,
    rows: npt.NDArray[np.intp],
    cols: npt.NDArray[np.intp],
    names: Mapping[str, Sequence[str]] | None = None,
    reference: str | None = None,
) -> Floats:
    """Mean and standard deviation of each band over patches, the baseline of embeddings.

    Args:
        files: Rasters of the scene by key of their sensor.
        grid: Grid of the patches.
        rows: Rows (N,).
        cols: Columns (N,).
        names: Names of the bands of files that do not say.
        reference: Sensor whose grid the patches are on.

    Returns:
        Statistics (N, 2 x bands); 0 where a patch has no valid pixel.

    Raises:
        ValueError: If the patches are not those of the rasters.
    """
    bands = bands_of([*files])
    found = np.zeros((len(rows), 2 * len(bands)), np.float32)
    with Scene(bands, files=files, names=names, missing='mean', reference=reference) as scene:
        size = round(grid.res[0] / scene.grid.res[0])
        offset = _offset(grid, scene.grid, max(1, size))
        if offset is None:
            raise ValueError(
                f'{scene.path}: its pixels are not those of the patches; give the rasters that '
                '`geofm embed` took, and its --reference_sensor'
            )
        for row in np.unique(rows):
            here = np.flatnonzero(rows == row)
            first, last = cols[here].min(), cols[here].max() + 1
            corner = offset[0] + int(row) * size, offset[1] + int(first) * size
            part = scene.read(*corner, size, int(last - first) * size)
            image = torch.where(part['valid'], part['image'], 0)
            lefts = ((cols[here] - first) * size).tolist()
            patches = {
                key: torch.stack([values[..., left : left + size] for left in lefts])
                for key, values in (('image', image), ('valid', part['valid']))
            }
            found[here] = band_statistics_encoder(patches).numpy()
    return found


def _offset(patches: Grid, scene: Grid, size: int) -> tuple[int, int] | None:
    """Pixel of a scene at which its patches begin; None if they are not those of the scene."""
    transform = patches.transform @ Affine.scale(1 / size)
    height, width = (side * size for side in patches.shape)
    offset = replace(patches, transform=transform, height=height, width=width).offset_in(scene)
    if offset is None:
        return None
    # They may begin before the scene, and end before or beyond it, but never by a whole patch.
    ends = (
        start + side - whole
        for start, side, whole in zip(offset, (height, width), scene.shape, strict=True)
    )
    inside = all(-size < start <= 0 for start in offset) and all(abs(end) < size for end in ends)
    return offset if inside else None
