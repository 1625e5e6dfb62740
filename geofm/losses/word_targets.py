"""Targets without a teacher: patch words of each patch and of a whole image."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from geofm.models import PatchWords

#: Regularisation of the whitening: variance added to each direction, relative to the largest.
_LEAST_VARIANCE = 1e-4


class Targets(NamedTuple):
    """Targets of B images of one sensor.

    Attributes:
        patches: Targets of each patch, and of the 3 x 3 patches around it, shape (B, N, 2, D).
        image: Targets of the whole images, shape (B, D).
        known: Whether at least half of each patch has data, bool, shape (B, N).
    """

    patches: Tensor
    image: Tensor
    known: Tensor


class WordTargets(nn.Module):
    """Whitened patch words of one sensor, as targets of patches and images.

    The words are those of :class:`geofm.models.PatchWords`, after Coates and Ng. A
    target is the mean code over an area, projected to the leading principal components and
    whitened, so that frequent words do not dominate. The areas are each patch of the model, the 3 x
    3 patches around it, and the whole image.

    Attributes:
        words: The words.
        fitted: Whether :meth:`fit` has run or its result has been loaded.
    """

    fitted: Tensor

    def __init__(self, channels: int, size: int = 8, words: int = 400, dim: int = 128) -> None:
        """Initialize a new WordTargets instance; :meth:`fit` learns the words.

        Args:
            channels: Number of bands.
            size: Side of a word in pixels, an even number.
            words: Number of words K.
            dim: Length D of a target.

        Raises:
            ValueError: If *dim* is larger than *words*, or *size* is not even.
        """
        super().__init__()
        if not 1 <= dim <= words:
            raise ValueError(f'targets of {dim} numbers need that many words, not {words}')
        self.words = PatchWords(channels, size, words)
        self.whiten_patch = _Whitening(words, dim)
        self.whiten_around = _Whitening(words, dim)
        self.whiten_image = _Whitening(words, dim)
        self.register_buffer('fitted', torch.tensor(False))

    @torch.no_grad()
    def fit(self, batches: Sequence[Mapping[str, Any]], patch_size: int, seed: int = 0) -> None:
        """Learn words and whitening from images.

        Args:
            batches: Batches with ``image`` (B, C, H, W), normalised, of this sensor's bands, and
                where known ``valid`` bool (B, H, W).
            patch_size: Side of a patch of the model in pixels.
            seed: Seed of the random numbers.

        Raises:
            ValueError: If the images are too few or too small for the words.
        """
        self.words.fit(batches, sum(len(batch['image']) for batch in batches), seed)
        of_patches, around_patches, of_images = _Moments(), _Moments(), _Moments()
        for batch in batches:
            codes = self._codes(batch['image'], batch.get('valid'), patch_size)
            of_patches.add(codes.patches[codes.known])
            around_patches.add(codes.around[codes.known])
            of_images.add(codes.image)
        self.whiten_patch.fit(of_patches)
        self.whiten_around.fit(around_patches)
        self.whiten_image.fit(of_images)
        self.fitted.fill_(True)

    @torch.no_grad()
    def forward(self, image: Tensor, valid: Tensor | None, patch_size: int) -> Targets:
        """Compute the targets of images.

        Args:
            image: Normalised images with this sensor's bands, shape (B, C, H, W).
            valid: Where there are data, bool, shape (B, H, W). None: everywhere.
            patch_size: Side of a patch of the model in pixels. Must divide H and W.

        Returns:
            The targets, in float32.
        """
        with torch.autocast(image.device.type, enabled=False):
            codes = self._codes(image.float(), valid, patch_size)
            scales = [self.whiten_patch(codes.patches), self.whiten_around(codes.around)]
            whole = self.whiten_image(codes.image)
            return Targets(torch.stack(scales, dim=2), whole, codes.known)

    def _codes(self, image: Tensor, valid: Tensor | None, patch_size: int) -> '_Codes':
        """Compute the square roots of mean codes, before whitening."""
        cells = (image.shape[-2] // patch_size, image.shape[-1] // patch_size)
        grid, whole = self.words.on_grid(image, cells, valid)
        if valid is None:
            known = torch.ones(len(image), *cells, dtype=torch.bool, device=image.device)
        else:
            known = adaptive_avg_pool2d(valid[:, None].float(), cells)[:, 0] >= 0.5
        # Patches without data do not contribute to the targets of their neighbours.
        weight = known[:, None].to(grid.dtype)
        sums = avg_pool2d(grid.square() * weight, 3, stride=1, padding=1)
        around = (sums / avg_pool2d(weight, 3, stride=1, padding=1).clamp_min(1 / 9)).sqrt()
        return _Codes(
            grid.flatten(2).mT,
            around.flatten(2).mT,
            whole,
            known.flatten(1),
        )


class _Codes(NamedTuple):
    """Square roots of mean codes of patches and 3 x 3 patches, (B, N, K), and images, (B, K)."""

    patches: Tensor
    around: Tensor
    image: Tensor
    known: Tensor


class _Moments:
    """Running count, sum and products of rows."""

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros(())
        self.products = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        rows = rows.double()
        self.count += len(rows)
        self.total = self.total + rows.sum(dim=0)
        self.products = self.products + rows.T @ rows


class _Whitening(nn.Module):
    """Projection to the leading principal components, each scaled to unit variance."""

    mean: Tensor
    projection: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer('mean', torch.zeros(size))
        self.register_buffer('projection', torch.zeros(size, dim))

    def fit(self, moments: _Moments) -> None:
        mean = moments.total / moments.count
        covariance = moments.products / moments.count - mean.outer(mean)
        variance, directions = torch.linalg.eigh(covariance)
        dim = self.projection.shape[1]
        variance, directions = variance.flip(0)[:dim].clamp_min(0), directions.flip(1)[:, :dim]
        scale = (variance + _LEAST_VARIANCE * variance[0]).rsqrt()
        self.mean.copy_(mean)
        self.projection.copy_(directions * scale)

    def forward(self, rows: Tensor) -> Tensor:
        whitened: Tensor = (rows - self.mean) @ self.projection
        return whitened
