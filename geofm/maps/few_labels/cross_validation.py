"""Cross-validation by spatial blocks of a map from a few labels, and its baseline."""

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

#: Maximum number of folds of the cross-validation.
FOLDS = 5


def blocks_of(
    grid: Grid, rows: npt.NDArray[np.intp], cols: npt.NDArray[np.intp], size: float
) -> npt.NDArray[np.intp]:
    """Return the spatial blocks of patches. Blocks are the same for all scenes.

    Args:
        grid: Grid of the patches.
        rows: Rows of the patches (N,).
        cols: Columns of the patches (N,).
        size: Side of a block in km.

    Returns:
        Code of the block that contains the centre of each patch (N, 1), see
        :class:`geofm.datasets.archive.Blocks`.
    """
    places = grid.transform @ (cols + 0.5, rows + 0.5)
    lon, lat = lonlat.transform_to_lonlat(grid, *places).T
    lon = lonlat.wrap(lon)
    codes, starts = Blocks(size).touched(np.stack([lon, lat, lon, lat], axis=1))
    return codes[starts, None].astype(np.intp)


def folds_of(blocks: npt.NDArray[np.intp]) -> list[tuple[npt.NDArray[np.intp], ...]]:
    """Divide samples into folds, so that training and test samples lie in different blocks.

    Args:
        blocks: Block of each sample (N, 1).

    Returns:
        Indices of the training and the test samples of each fold; empty if all samples lie in one
        block.
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
    """Classify the samples of each fold with a classifier fitted to the other folds.

    Args:
        method: Method of classification.
        vectors: Embeddings or other features (N, D).
        values: Class of each sample (N,).
        blocks: Block of each sample (N, 1).
        legend: The classes.
        size: Side of a block in km, for the report.
        seed: Seed of the intervals.

    Returns:
        The accuracy over all samples; None if all samples lie in one block.
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
    """Compute the mean and standard deviation of each band over patches, as a baseline.

    Args:
        files: Rasters of the scene by key of their sensor.
        grid: Grid of the patches.
        rows: Rows of the patches (N,).
        cols: Columns of the patches (N,).
        names: Names of the bands of a file by sensor, for files without band descriptions.
        reference: Sensor whose grid the patches are on.

    Returns:
        Statistics (N, 2 x bands); 0 where a patch has no valid pixel.

    Raises:
        ValueError: If the patch grid does not match the rasters.
    """
    bands = bands_of([*files])
    found = np.zeros((len(rows), 2 * len(bands)), np.float32)
    with Scene(bands, files=files, names=names, missing='mean', reference=reference) as scene:
        size = round(grid.res[0] / scene.grid.res[0])
        offset = _offset(grid, scene.grid, max(1, size))
        if offset is None:
            raise ValueError(
                f'{scene.path}: its pixels do not match the patch grid; give the rasters that were '
                'given to `geofm embed`, with the same --reference_sensor'
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
    """Return the pixel of a scene where a patch grid begins; None if they do not match."""
    transform = patches.transform @ Affine.scale(1 / size)
    height, width = (side * size for side in patches.shape)
    offset = replace(patches, transform=transform, height=height, width=width).offset_in(scene)
    if offset is None:
        return None
    # With a stride, patches may begin before the scene, and end before or beyond it, but never by a
    # whole patch.
    ends = (
        start + side - whole
        for start, side, whole in zip(offset, (height, width), scene.shape, strict=True)
    )
    inside = all(-size < start <= 0 for start in offset) and all(abs(end) < size for end in ends)
    return offset if inside else None
