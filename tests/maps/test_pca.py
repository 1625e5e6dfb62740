from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA

from geofm.maps.make.pca import PCABasis, known_tokens
from geofm.maps.make.windows import Strip

Strips = Callable[[], list[Strip]]


def _tokens(seed: int = 0, mean: float = 0) -> np.ndarray:
    """Tokens (D, rows, columns) of unequal variance, some of them NaN."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((6, 6)) @ random.standard_normal((6, 23 * 17))
    tokens = (mixed + mean).reshape(6, 23, 17).astype(np.float32)
    tokens[:, 4:7, 3] = np.nan
    return tokens


def _strips(tokens: np.ndarray, rows: int = 5) -> Strips:
    return lambda: [
        Strip(tokens[:, r : r + rows], np.isfinite(tokens[0, r : r + rows]))
        for r in range(0, tokens.shape[1], rows)
    ]


# With a large mean, a covariance that is summed around zero is inaccurate.
@pytest.mark.parametrize('mean', [0, 1000])
def test_components_equal_those_of_all_tokens_at_once(mean: float) -> None:
    tokens = _tokens(mean=mean)
    basis = PCABasis.fit(_strips(tokens), 4, 'hash')
    flat = tokens.reshape(6, -1).T
    known = flat[np.isfinite(flat).all(axis=1)].astype(np.float64)
    reference = PCA(4, svd_solver='full').fit(known)
    np.testing.assert_allclose(basis.mean, known.mean(axis=0), rtol=1e-6)
    cosines = np.abs((basis.components * reference.components_).sum(axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-6)
    count = len(known)
    np.testing.assert_allclose(
        basis.std**2, reference.explained_variance_ * (count - 1) / count, rtol=1e-5
    )
    scores = basis.scores(tokens)
    assert np.isnan(scores[:, 4:7, 3]).all()
    expected = np.abs(reference.transform(known))
    flat_scores = scores.reshape(4, -1).T
    np.testing.assert_allclose(np.abs(flat_scores[np.isfinite(flat_scores[:, 0])]), expected,
                               atol=2e-3)  # fmt: skip


def test_signs_are_reproducible() -> None:
    tokens = _tokens()
    basis = PCABasis.fit(_strips(tokens), 3, '')
    for component in basis.components:
        assert component[np.abs(component).argmax()] > 0
    # They also do not depend on the order of patches or the height of strips.
    other = PCABasis.fit(_strips(tokens[:, ::-1], 7), 3, '')
    np.testing.assert_allclose(other.components, basis.components, atol=1e-6)
    assert other.foreground == basis.foreground


def test_the_smaller_side_is_foreground() -> None:
    """A tenth of the patches are far from the others, on one of both sides."""
    for side in (-1, 1):
        tokens = np.random.default_rng(0).normal(0, 0.1, (4, 10, 10)).astype(np.float32)
        tokens[2, :, 3] += side * 5
        basis = PCABasis.fit(_strips(tokens), 3, '')
        (mask,) = np.concatenate([s.values for s in basis.foregrounds(_strips(tokens)())], axis=1)
        expected = np.zeros((10, 10))
        expected[:, 3] = 1
        np.testing.assert_array_equal(mask, expected)


def test_colours_are_standard_deviations() -> None:
    basis = PCABasis(np.zeros(3), np.eye(3), np.array([3.0, 2.0, 0.0]), 1, '')
    values = np.zeros((3, 1, 5), np.float32)
    values[0, 0] = [-9, -6, 0, 6, np.nan]
    values[1, 0] = [4, 0, 2, -2, np.nan]
    (strip,) = basis.colors([Strip(values, np.ones((1, 5), bool))])
    np.testing.assert_allclose(strip.values[0, 0], [1, 1, 128, 255, np.nan])
    np.testing.assert_allclose(strip.values[1, 0], [255, 128, 191.5, 64.5, np.nan])
    # A constant component is grey, and not an error.
    np.testing.assert_allclose(strip.values[2, 0, :4], 128)


def test_a_basis_is_saved_and_loaded(tmp_path: Path) -> None:
    basis = PCABasis.fit(_strips(_tokens()), 3, 'abc')
    path = tmp_path / 'a_pca.safetensors'
    basis.save(path)
    again = PCABasis.load(path)
    for name in ('mean', 'components', 'std'):
        np.testing.assert_array_equal(getattr(again, name), getattr(basis, name))
    assert (again.foreground, again.weights_sha256) == (basis.foreground, 'abc')
    assert [entry.name for entry in tmp_path.iterdir()] == ['a_pca.safetensors']


def test_unsuitable_tokens_are_an_error(tmp_path: Path) -> None:
    empty = np.full((6, 2, 2), np.nan, np.float32)
    with pytest.raises(ValueError, match='at least two patches'):
        PCABasis.fit(_strips(empty), 3, '')
    with pytest.raises(ValueError, match='components=7, but tokens have 6'):
        PCABasis.fit(_strips(_tokens()), 7, '')
    assert known_tokens(_strips(empty)()[0]).shape == (0, 6)
    with pytest.raises(FileNotFoundError, match=r'gone\.safetensors'):
        PCABasis.load(tmp_path / 'gone.safetensors')
