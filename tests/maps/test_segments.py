import numpy as np
import pytest

from geofm.maps.make.segments import Segmenter, segment_colors
from geofm.maps.make.windows import Strip


def _blobs(sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (D, rows, 20) of one direction per size, and the index of their direction."""
    random = np.random.default_rng(0)
    truth = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    directions = random.standard_normal((len(sizes), 8))
    # The length of a token must not matter.
    tokens = directions[truth] * random.uniform(0.5, 5, (len(truth), 1))
    tokens = tokens + random.normal(0, 0.02, tokens.shape)
    return tokens.T.reshape(8, -1, 20).astype(np.float32), truth.reshape(-1, 20)


def _strips(tokens: np.ndarray) -> list[Strip]:
    parts = np.array_split(tokens, 3, axis=1)
    return [Strip(part, np.isfinite(part).all(axis=0)) for part in parts]


def test_segments_are_directions_sorted_by_size() -> None:
    tokens, truth = _blobs((40, 200, 160))
    tokens[:, 3, 5] = np.nan
    segmenter = Segmenter(lambda: _strips(tokens), 3, 400)
    labels = np.concatenate([strip.values for strip in segmenter.assign(_strips(tokens))], axis=1)
    assert labels.shape == (1, 20, 20)
    assert np.isnan(labels[0, 3, 5])
    known = np.isfinite(labels[0])
    np.testing.assert_array_equal(labels[0][known], np.array([2, 0, 1])[truth][known])


def test_segments_depend_on_the_seed() -> None:
    tokens = np.random.default_rng(1).standard_normal((8, 30, 20)).astype(np.float32)

    def labels(seed: int) -> np.ndarray:
        segmenter = Segmenter(lambda: _strips(tokens), 5, 600, seed)
        return np.concatenate([s.values for s in segmenter.assign(_strips(tokens))], axis=1)

    np.testing.assert_array_equal(labels(3), labels(3))
    assert not np.array_equal(labels(3), labels(4))


def test_a_large_scene_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, truth = _blobs((300, 500))
    monkeypatch.setattr('geofm.maps.make.segments._SAMPLE', 100)
    segmenter = Segmenter(lambda: _strips(tokens), 2, 800)
    assert 100 <= len(segmenter._kmeans.labels_) <= 104
    labels = np.concatenate([strip.values for strip in segmenter.assign(_strips(tokens))], axis=1)
    np.testing.assert_array_equal(labels[0], np.array([1, 0])[truth])


def test_unsuitable_numbers_are_an_error() -> None:
    tokens, _ = _blobs((20,))
    with pytest.raises(ValueError, match='segments=1 is not between 2 and 255'):
        Segmenter(lambda: _strips(tokens), 1, 20)
    with pytest.raises(ValueError, match='segments=30, but the scene has 20 patches'):
        Segmenter(lambda: _strips(tokens), 30, 20)


def test_colours_of_segments_differ() -> None:
    colors = segment_colors(16)
    assert len(set(colors.values())) == 16
    assert segment_colors(20)[16] == colors[0]
