"""Pixel baseline of `experiments/floods.py`: boosted trees on local means."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from flood_data import SIDE, Floods, Pixels, Split
from rich.progress import track
from scipy.ndimage import uniform_filter
from sklearn.ensemble import HistGradientBoostingClassifier

#: Sides of the windows of the means, in pixels.
WINDOWS = (1, 3, 9, 27)

#: Training pixels drawn from each place.
PIXELS = 1000


def pixel_features(image: Pixels) -> npt.NDArray[np.float32]:
    """Return the mean of each band over windows around each pixel.

    Args:
        image: Of shape (C, H, W).

    Returns:
        Of shape (H W, C len(WINDOWS)).
    """
    values = image.astype(np.float32)
    means = [uniform_filter(band, side, mode='reflect') for band in values for side in WINDOWS]
    return np.stack([mean.ravel() for mean in means], axis=1)


def pixel_baseline(
    floods: Floods, sensors: Sequence[str], seed: int, splits: Sequence[Split]
) -> dict[Split, Pixels]:
    """Train on pixels of the training places and map other places.

    Args:
        floods: The places.
        sensors: Keys of the sensors.
        seed: Seed of the pixels that are drawn and of the trees.
        splits: Splits to map.

    Returns:
        Classes (N, H, W) of each split.
    """
    generator = np.random.default_rng(seed)
    features, classes = [], []
    places = zip(floods.places('train'), floods.masks('train'), strict=True)
    for place, mask in places:
        chosen = generator.choice(SIDE * SIDE, PIXELS, replace=False)
        features.append(pixel_features(floods.image('train', place, sensors))[chosen])
        classes.append(mask.ravel()[chosen])
    model = HistGradientBoostingClassifier(random_state=seed)
    model.fit(np.concatenate(features), np.concatenate(classes))
    found: dict[Split, Pixels] = {}
    for split in splits:
        names = track(floods.places(split), f'pixel baseline: {split}')
        maps = [model.predict(pixel_features(floods.image(split, n, sensors))) for n in names]
        found[split] = np.stack(maps).reshape(-1, SIDE, SIDE).astype(np.uint8)
    return found
