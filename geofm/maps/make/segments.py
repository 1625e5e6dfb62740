"""Segments of a scene: clusters of similar patch tokens, by k-means."""

from collections.abc import Callable, Iterable, Iterator
from itertools import batched

import numpy as np
from sklearn.cluster import MiniBatchKMeans

from geofm.maps.make.embeddings import unit_vectors
from geofm.maps.make.pca import known_tokens
from geofm.maps.make.windows import Floats, Strip
from geofm.maps.make.writer import Colors
from geofm.printing import counted

#: Maximum number of segments: values 0 to 254 of uint8, and 255 for nodata.
MOST_SEGMENTS = 255

#: Maximum number of patches that k-means is fitted to. All patches are assigned to segments.
_SAMPLE = 20_000

# The muted scheme of Paul Tol, then the scheme of Okabe and Ito: both are safe for colour
# blindness.
_PALETTE = bytes.fromhex(
    '332288 88CCEE DDCC77 117733 CC6677 44AA99 999933 882255 AA4499'
    'E69F00 56B4E9 009E73 F0E442 0072B2 D55E00 CC79A7'
)


class Segmenter:
    """K-means clustering of patch tokens by direction.

    Tokens are scaled to unit length, so that tokens are similar if their cosine is high. Segments
    are numbered by size, starting with the largest.

    Args:
        strips: Function that returns patch tokens, (D, rows, columns) per strip. Only a regular
            sample of the tokens is held in memory.
        segments: Number of segments.
        patches: Number of patches of the scene, including patches without data.
        seed: Seed of k-means.

    Raises:
        ValueError: If the number of segments is out of range, or there are fewer patches with data.
    """

    def __init__(
        self, strips: Callable[[], Iterable[Strip]], segments: int, patches: int, seed: int = 0
    ) -> None:
        if not 2 <= segments <= MOST_SEGMENTS:
            raise ValueError(f'segments={segments} is not between 2 and {MOST_SEGMENTS}')
        step = max(1, patches // _SAMPLE)
        sample = np.concatenate([_directions(known_tokens(strip)[::step]) for strip in strips()])
        if len(sample) < segments:
            known = counted(len(sample), 'patch', 'patches')
            raise ValueError(f'segments={segments}, but the scene has {known} with data')
        self._kmeans = MiniBatchKMeans(segments, random_state=seed, n_init=3).fit(sample)
        sizes = np.bincount(self._kmeans.labels_, minlength=segments)
        self._rank = np.argsort(np.argsort(-sizes, kind='stable'), kind='stable')

    def assign(self, strips: Iterable[Strip]) -> Iterator[Strip]:
        """Assign each patch to a segment.

        Args:
            strips: Patch tokens, (D, rows, columns) each.

        Yields:
            Strips with the number of the segment; NaN where there is no data.
        """
        for strip in strips:
            tokens = known_tokens(strip)
            labels = np.full(strip.values.shape[1:], np.nan, np.float32)
            if len(tokens):
                known = np.isfinite(strip.values).all(axis=0)
                labels[known] = self._rank[self._kmeans.predict(_directions(tokens))]
            yield Strip(labels[None], strip.valid)


def segment_colors(segments: int) -> Colors:
    """Return colours for segments that are safe for colour blindness.

    Args:
        segments: Number of segments.

    Returns:
        Red, green and blue of each segment. Colours repeat after 16 segments.
    """
    colors = [(r, g, b) for r, g, b in batched(_PALETTE, 3)]
    return {i: colors[i % len(colors)] for i in range(segments)}


def _directions(tokens: Floats) -> Floats:
    """Scale tokens (N, D) to unit length; those without length stay 0."""
    return np.nan_to_num(unit_vectors(tokens, 1))
