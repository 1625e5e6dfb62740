"""Principal components of patch tokens: one basis for a whole scene, and for the next."""

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

#: A colour channel goes from this many standard deviations below the mean to as many above.
_RANGE = 2.0

#: Strips from top to bottom, from the start each time it is called.
Strips = Callable[[], Iterable[Strip]]


@dataclass(frozen=True)
class PCABasis:
    """Principal components of patch tokens.

    Attributes:
        mean: Mean of the tokens, shape (D,).
        components: Orthonormal directions of greatest variance, shape (K, D). The entry of greatest
            magnitude of each is positive, so the same tokens give the same signs.
        std: Standard deviation along each, shape (K,).
        foreground: Side of the first component that is called foreground, 1 or -1: the one on which
            fewer patches lie, as what stands out of a scene is the smaller part of it.
        weights_sha256: Hash of the weights of the model that made the tokens.
    """

    mean: npt.NDArray[np.float64]
    components: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]
    foreground: int
    weights_sha256: str

    @classmethod
    def fit(cls, strips: Strips, components: int, weights_sha256: str) -> Self:
        """Find the components of a scene, reading it twice and never holding it.

        The covariance is summed in float64 around the mean of the first strip, which keeps it
        exact when the mean is large.

        Args:
            strips: Patch tokens, (D, rows, columns) each; NaN where nothing is known.
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
        """Coordinates of tokens.

        Args:
            tokens: Shape (D, rows, columns).

        Returns:
            Shape (K, rows, columns); NaN where the tokens are.
        """
        flat = tokens.reshape(len(tokens), -1).T.astype(np.float64)
        scores = (flat - self.mean) @ self.components.T
        return scores.T.reshape(-1, *tokens.shape[1:]).astype(np.float32)

    def project(self, strips: Iterable[Strip]) -> Iterator[Strip]:
        """Coordinates of the tokens of strips, (K, rows, columns) each."""
        for strip in strips:
            yield Strip(self.scores(strip.values), strip.valid)

    def colors(self, strips: Iterable[Strip]) -> Iterator[Strip]:
        """First three components as red, green and blue in 1..255; 0 is left for nodata.

        Each goes from two standard deviations of the basis below its mean to two above, so that
        colours mean the same in every scene of that basis.
        """
        spread = _RANGE * np.maximum(self.std[:3, None, None], np.finfo(np.float32).tiny)
        for strip in self.project(strips):
            share = (strip.values[:3] / spread + 1) / 2
            yield Strip((1 + 254 * share.clip(0, 1)).astype(np.float32), strip.valid)

    def foregrounds(self, strips: Iterable[Strip]) -> Iterator[Strip]:
        """1 where the first component is on the side of the foreground, 0 elsewhere."""
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
            path: File that :meth:`save` wrote.

        Returns:
            The basis.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no basis.
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
                f'{path}: no PCA basis; give a *_pca.safetensors that `geofm map` wrote'
            ) from error


def known_tokens(strip: Strip) -> Floats:
    """Tokens of the patches that hold data.

    Args:
        strip: Patch tokens, (D, rows, columns).

    Returns:
        Shape (N, D).
    """
    flat = strip.values.reshape(len(strip.values), -1).T
    return flat[np.isfinite(flat).all(axis=1)]
