"""Principal components of patch tokens. A basis of one scene can be used for other scenes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from geofm.atomic import atomic_file
from geofm.maps.make.windows import Floats, Strip

#: A colour channel covers this many standard deviations on both sides of the mean.
_RANGE = 2.0

#: Function that returns the strips of a scene from top to bottom, from the start at each call.
Strips = Callable[[], Iterable[Strip]]


@dataclass(frozen=True)
class PCABasis:
    """Principal components of patch tokens.

    Attributes:
        mean: Mean of the tokens, of shape (D,).
        components: Orthonormal directions of largest variance, of shape (K, D). The entry of
            largest magnitude of each is positive, so that the signs are reproducible.
        std: Standard deviation along each component, of shape (K,).
        foreground: Sign of the first component in the foreground, 1 or -1. The side with fewer
            patches is called foreground.
        weights_sha256: Hash of the weights of the model that made the tokens.
    """

    mean: npt.NDArray[np.float64]
    components: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]
    foreground: int
    weights_sha256: str

    @classmethod
    def fit(cls, strips: Strips, components: int, weights_sha256: str) -> Self:
        """Fit the components to a scene, which is read twice, strip by strip.

        The covariance is summed in float64 around the mean of the first strip, to be accurate if
        the mean is large.

        Args:
            strips: Patch tokens, (D, rows, columns) each; NaN where there is no data.
            components: Number K of components.
            weights_sha256: Hash of the weights of the model.

        Returns:
            The basis.

        Raises:
            ValueError: If there are fewer than two patches, or fewer dimensions than components.
        """
        count, shift = 0, None
        total, products = np.zeros(1), np.zeros((1, 1))
        for tokens in map(known_tokens, strips()):
            if len(tokens) == 0:
                continue
            if shift is None:
                shift = tokens.mean(axis=0, dtype=np.float64)
            centred = tokens - shift
            count += len(tokens)
            total = total + centred.sum(axis=0)
            products = products + centred.T @ centred
        if shift is None or count < 2:
            raise ValueError('PCA needs at least two patches with data')
        if components > len(shift):
            raise ValueError(f'components={components}, but tokens have {len(shift)} dimensions')
        offset = total / count
        covariance = products / count - np.outer(offset, offset)
        variances, directions = np.linalg.eigh(covariance)
        chosen = directions.T[::-1][:components]
        largest = np.abs(chosen).argmax(axis=1)
        chosen = chosen * np.sign(chosen[np.arange(components), largest])[:, None]
        std = np.sqrt(np.maximum(variances[::-1][:components], 0))
        basis = cls(shift + offset, chosen, std, 1, weights_sha256)
        above = sum(int((basis.scores(strip.values)[0] > 0).sum()) for strip in strips())
        return cls(basis.mean, chosen, std, 1 if 2 * above <= count else -1, weights_sha256)

    def scores(self, tokens: Floats) -> Floats:
        """Project tokens onto the components.

        Args:
            tokens: Tokens of shape (D, rows, columns).

        Returns:
            Scores of shape (K, rows, columns); NaN where the tokens are NaN.
        """
        flat = tokens.reshape(len(tokens), -1).T.astype(np.float64)
        scores = (flat - self.mean) @ self.components.T
        return scores.T.reshape(-1, *tokens.shape[1:]).astype(np.float32)

    def project(self, strips: Iterable[Strip]) -> Iterator[Strip]:
        """Yield the scores of strips of tokens, (K, rows, columns) each."""
        for strip in strips:
            yield Strip(self.scores(strip.values), strip.valid)

    def colors(self, strips: Iterable[Strip]) -> Iterator[Strip]:
        """Yield the first three components as red, green and blue, 1 to 255; 0 is nodata.

        Each channel covers two standard deviations of the basis on both sides of the mean, so that
        colours are comparable between scenes with the same basis.
        """
        spread = _RANGE * np.maximum(self.std[:3, None, None], np.finfo(np.float32).tiny)
        for strip in self.project(strips):
            position = (strip.values[:3] / spread + 1) / 2
            yield Strip((1 + 254 * position.clip(0, 1)).astype(np.float32), strip.valid)

    def foregrounds(self, strips: Iterable[Strip]) -> Iterator[Strip]:
        """Yield 1 for patches of the foreground by the first component, 0 for the others."""
        for strip in self.project(strips):
            first = self.foreground * strip.values[:1]
            mask = np.where(np.isnan(first), np.nan, first > 0).astype(np.float32)
            yield Strip(mask, strip.valid)

    def save(self, path: Path) -> None:
        """Write the basis to a file.

        Args:
            path: A ``.safetensors`` file.
        """
        arrays = {
            name: np.ascontiguousarray(getattr(self, name))
            for name in ('mean', 'components', 'std')
        }
        about = {'foreground': str(self.foreground), 'weights_sha256': self.weights_sha256}
        with atomic_file(path) as part:
            part.write_bytes(save(arrays, about))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a basis.

        Args:
            path: File written by :meth:`save`.

        Returns:
            The basis.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it is not a basis.
        """
        if not path.is_file():
            raise FileNotFoundError(f'{path}: no such file (given as the PCA basis)')
        try:
            with safe_open(path, framework='numpy') as file:
                about = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in ('mean', 'components', 'std')}
            return cls(**arrays, foreground=int(about['foreground']),
                       weights_sha256=about['weights_sha256'])  # fmt: skip
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f'{path}: not a PCA basis; give a *_pca.safetensors written by `geofm map`'
            ) from error


def known_tokens(strip: Strip) -> Floats:
    """Return the tokens of the patches with data.

    Args:
        strip: Patch tokens, (D, rows, columns).

    Returns:
        Tokens of shape (N, D).
    """
    flat = strip.values.reshape(len(strip.values), -1).T
    return flat[np.isfinite(flat).all(axis=1)]
