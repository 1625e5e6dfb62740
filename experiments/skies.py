"""Cloud cover of windows of the sample data: the fraction that clouds hide from Sentinel-2."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from geofm.datasets import SampleLandCover
from geofm.sample.landscape import draw_landscape
from geofm.sample.plan import dates_of, patches_of, randomness
from geofm.sample.scene import draw_region, sentinel2
from geofm.sen12ms import Roi

#: Range of the fraction of a window that clouds hide.
SKIES = {'clear': (0.0, 0.05), 'partly': (0.05, 0.6), 'overcast': (0.6, 1.01)}


def pairs_of(dataset: SampleLandCover) -> list[tuple[Any, ...]]:
    """Return season, ROI, patch and time step of each window."""
    index = dataset.pairs.index[['season', 'roi', 'patch', 'time_step']]
    rows = list(index.itertuples(index=False, name=None))
    return [rows[pair] for pair in dataset.index['pair']]


def cloud_masks(made: Mapping[str, Any], roi: Roi) -> dict[tuple[int, int], npt.NDArray[np.bool_]]:
    """Return cloud masks (H, W) of a ROI by patch and time step, drawn again."""
    patches = patches_of(roi, made['patches_per_roi'], made['size'])
    shape = max(p.rows.stop for p in patches), max(p.cols.stop for p in patches)
    landscape = draw_landscape(randomness(made['seed'], roi, 0), shape)
    region = draw_region(randomness(made['seed'], roi, 1))
    masks: dict[tuple[int, int], npt.NDArray[np.bool_]] = {}
    for step, date in enumerate(dates_of(randomness(made['seed'], roi, 2), made['time_steps'])):
        noise = randomness(made['seed'], roi, 4, step)
        _, cloudy = sentinel2(noise, landscape, region, date.s2, date.cover)
        masks |= {(patch.number, step): cloudy[patch.rows, patch.cols] for patch in patches}
    return masks


def hidden_shares(data: Path, dataset: SampleLandCover) -> npt.NDArray[np.float64]:
    """Return the fraction of each window that clouds hide from Sentinel-2.

    The data only state the fraction of whole patches, so the clouds are drawn again.

    Raises:
        ValueError: If the clouds differ from those in the data.
    """
    made = json.loads((data / 'sample.json').read_text())
    scenes = pd.read_csv(data / 'scenes.csv').set_index(['season', 'roi', 'patch', 'time_step'])
    pairs = pairs_of(dataset)
    masks = {
        (*roi, *key): mask
        for roi in dict.fromkeys(pair[:2] for pair in pairs)
        for key, mask in cloud_masks(made, roi).items()
    }
    shares = []
    for pair, row, col in zip(pairs, dataset.index['row'], dataset.index['col'], strict=True):
        known, mask = scenes.cloud_cover[pair], masks[pair]
        if abs(mask.mean() - known) > 1e-4:
            raise ValueError(
                f'{data}: clouds hide {known} of {pair}, but {mask.mean():.4f} of what is drawn '
                'now: write the data again'
            )
        shares.append(mask[row:, col:][: dataset.window, : dataset.window].mean())
    return np.array(shares)


def skies(shares: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.bool_]]:
    """Return a mask of the windows under each sky."""
    return {sky: (low <= shares) & (shares < high) for sky, (low, high) in SKIES.items()}
