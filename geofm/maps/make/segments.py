"""Segments of a scene: patches whose tokens are alike, by k-means."""

from collections.abc import Callable, Iterable, Iterator
from itertools import batched

import numpy as np
from sklearn.cluster import MiniBatchKMeans

from geofm.maps.make.pca import known_tokens
from geofm.maps.make.windows import Floats, Strip
from geofm.maps.make.writer import Colors

#: Most segments: values 0..254 of uint8, and 255 for nodata.
MOST_SEGMENTS = 255

#: Most patches that k-means learns from; all of them are assigned.
_SAMPLE = 20_000

# Paul Tol's muted scheme, then Okabe and Ito's: told apart with any colour vision.
_PALETTE = bytes.fromhex(
    '332288 88CCEE DDCC77 117733 CC6677 44AA99 999933 882255 AA4499'
    'E69F00 56B4E9 009E73 F0E442 0072B2 D55E00 CC79A7'
)


class Segmenter:
    """K-means of the directions of patch tokens.

    Tokens are scaled to unit length, so that those are alike whose cosine is high. Segments are
    numbered by size, 0 the largest.

    Args:
        strips: Patch tokens, (D, rows, columns) each, from the start at each call. Only an even
            sample of them is held.
        segments: Number of segments.
        patches: Patches of the scene, at most.
        seed: Seed of k-means.

    Raises:
        ValueError: If there are fewer patches with data than segments, or too many segments.
    """

    def __init__(
        self, strips: Callable[[], Iterable[Strip]], segments: int, patches: int, seed: int = 0
    ) -> None:
        if not 2 <= segments <= MOST_SEGMENTS:
            raise ValueError(f'segments={segments} is not between 2 and {MOST_SEGMENTS}')
        step = max(1, patches // _SAMPLE)
        sample = np.concatenate([_unit(known_tokens(strip)[::step]) for strip in strips()])
        if len(sample) < segments:
            raise ValueError(f'segments={segments}, but there are {len(sample)} patches with data')
        self._kmeans = MiniBatchKMeans(segments, random_state=seed, n_init=3).fit(sample)
        sizes = np.bincount(self._kmeans.labels_, minlength=segments)
        self._rank = np.argsort(np.argsort(-sizes, kind='stable'), kind='stable')

    def assign(self, strips: Iterable[Strip]) -> Iterator[Strip]:
        """Number of each patch's segment.

        Args:
            strips: Patch tokens, (D, rows, columns) each.

        Yields:
            Strips of one value; NaN where nothing is known.
        """
        for strip in strips:
            tokens = known_tokens(strip)
            labels = np.full(strip.values.shape[1:], np.nan, np.float32)
            if len(tokens):
                known = np.isfinite(strip.values).all(axis=0)
                labels[known] = self._rank[self._kmeans.predict(_unit(tokens))]
            yield Strip(labels[None], strip.valid)


def segment_colors(segments: int) -> Colors:
    """Colours that tell segments apart, with any colour vision; more than 16 repeat.

    Args:
        segments: Number of segments.

    Returns:
        Red, green and blue of each.
    """
    colors = [(r, g, b) for r, g, b in batched(_PALETTE, 3)]
    return {i: colors[i % len(colors)] for i in range(segments)}


def _unit(tokens: Floats) -> Floats:
    length = np.linalg.norm(tokens, axis=1, keepdims=True)
    return (tokens / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)
