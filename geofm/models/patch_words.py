"""Patch words: codes of small patches, learned without labels and gradients."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, conv2d, normalize, pad

#: Number of patches from which the words are learned, and of iterations of k-means.
_PATCHES, _ITERATIONS = 100_000, 10

#: Regularisation: variance added to each patch and to each direction of the whitening.
_LEAST_CONTRAST, _LEAST_VARIANCE = 0.01, 0.01

#: Threshold of the product of a whitened patch and a word, in its standard deviations.
_THRESHOLD = 1.0


class PatchWords(nn.Module):
    """Similarity of an image to each of a set of typical patches, the words.

    The method follows Coates, Lee and Ng, "An Analysis of Single-Layer Networks in Unsupervised
    Feature Learning" (AISTATS 2011), and Coates and Ng, "The Importance of Encoding Versus Training
    with Sparse Coding and Vector Quantization" (ICML 2011). Patches are normalised in brightness
    and contrast and ZCA-whitened. The words are the centres of spherical k-means. The code of a
    patch is its product with each word, minus a threshold and clamped at 0. All of this is computed
    as one convolution, whose output is averaged over an area.

    The defaults were chosen on the validation cells of EuroSAT RGB.

    Attributes:
        patch_size: Side P of a patch in pixels. The stride of patches is half of it.
        filters: Whitened words as filters, (K, C, P, P).
        offset: Response of each filter to the mean patch, (K,).
    """

    filters: Tensor
    offset: Tensor

    def __init__(self, channels: int, patch_size: int = 8, words: int = 400) -> None:
        """Initialize a new PatchWords instance without words; :meth:`fit` learns them.

        Args:
            channels: Number of channels.
            patch_size: Side of a patch in pixels, an even number.
            words: Number of words K, at least 2.

        Raises:
            ValueError: If *patch_size* is not even, or *words* is less than 2.
        """
        super().__init__()
        if patch_size < 2 or patch_size % 2 or words < 2:
            raise ValueError(
                f'patch_size={patch_size} must be an even number and words={words} at least 2'
            )
        self.patch_size = patch_size
        self.register_buffer('filters', torch.zeros(words, channels, patch_size, patch_size))
        self.register_buffer('offset', torch.zeros(words))

    @torch.inference_mode()
    def fit(self, batches: Iterable[Mapping[str, Any]], images: int, seed: int = 0) -> None:
        """Learn the words from images.

        Args:
            batches: Batches with ``image`` (B, C, H, W), normalised by band, and optionally
                ``valid`` bool (B, H, W).
            images: Number of images in all batches.
            seed: Seed for drawing patches and the initial words.

        Raises:
            ValueError: If the images are smaller than a patch, or if fewer patches without nodata
                pixels are drawn from them than there are words.
        """
        generator = torch.Generator().manual_seed(seed)
        each = -(-_PATCHES // max(1, images))
        found = [self._draw(batch, each, generator) for batch in batches]
        patches = torch.cat(found) if found else torch.zeros(0, self.filters[0].numel())
        words = len(self.filters)
        if len(patches) < words:
            raise ValueError(
                f'{len(patches)} patches of {self.patch_size} x {self.patch_size} pixels without '
                f'nodata pixels are too few for {words} words: give more images or fewer words'
            )
        mean, whitening = _zca(patches)
        white = normalize((patches - mean) @ whitening, dim=1)
        centres = spherical_kmeans(white, words, generator)
        self.filters.copy_((centres @ whitening).view_as(self.filters))
        self.offset.copy_(self.filters.flatten(1) @ mean)

    def _draw(self, batch: Mapping[str, Any], each: int, generator: torch.Generator) -> Tensor:
        """Draw patches of each image, normalised in brightness and contrast, (N, C x P x P)."""
        image: Tensor = batch['image']
        size = self.patch_size
        rows, cols = (side - size + 1 for side in image.shape[-2:])
        if min(rows, cols) < 1:
            raise ValueError(
                f'images of {tuple(image.shape[-2:])} pixels are smaller than a patch of {size}'
            )
        # At most as many as there are non-overlapping patches.
        side_by_side = (image.shape[-2] // size) * (image.shape[-1] // size)
        number = torch.arange(len(image)).repeat_interleave(min(each, side_by_side))
        row = torch.randint(rows, (len(number),), generator=generator)
        col = torch.randint(cols, (len(number),), generator=generator)
        windows = image.unfold(2, size, 1).unfold(3, size, 1)
        patches = windows[number, :, row, col].flatten(1)
        known = _whole(windows[:, 0, :, :, 0, 0], batch.get('valid'), size, 1)
        if known is not None:
            patches = patches[known[number, row, col]]
        variance = patches.var(dim=1, keepdim=True, correction=0) + _LEAST_CONTRAST
        return (patches - patches.mean(dim=1, keepdim=True)) / variance.sqrt()

    def forward(self, image: Tensor) -> Tensor:
        """Compute the codes of the patches of images.

        Args:
            image: Images normalised by band, (B, C, H, W), at least as large as a patch.

        Returns:
            Non-negative codes of shape (B, K, h, w), with a stride of :attr:`patch_size` / 2
            pixels.
        """
        size, stride = self.patch_size, self.patch_size // 2
        mean = avg_pool2d(image.mean(dim=1, keepdim=True), size, stride)
        square = avg_pool2d(image.square().mean(dim=1, keepdim=True), size, stride)
        contrast = ((square - mean.square()).clamp_min(0) + _LEAST_CONTRAST).sqrt()
        # (patch - mean) * filter equals patch * (filter - mean of the filter).
        filters = self.filters - self.filters.mean(dim=(1, 2, 3), keepdim=True)
        # Channels last is about a third faster on a CPU.
        image = image.contiguous(memory_format=torch.channels_last)
        codes = conv2d(image, filters, stride=stride).div_(contrast)
        return codes.sub_(self.offset.view(-1, 1, 1) + _THRESHOLD).clamp_min_(0)

    def of_image(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute the square root of the mean code over patches without nodata pixels.

        Args:
            image: Images normalised by band, (B, C, H, W).
            valid: Where there are data, bool (B, H, W). None: everywhere.

        Returns:
            Tensor of shape (B, K); zero for images without a complete patch.
        """
        return self._pooled(self(image), valid)

    def on_grid(
        self, image: Tensor, cells: tuple[int, int], valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the square roots of the mean codes around each cell of a grid.

        Args:
            image: Images normalised by band, (B, C, H, W).
            cells: Rows and columns of the grid (h, w).
            valid: As in :meth:`of_image`.

        Returns:
            Values of the cells, (B, K, h, w), and the result of :meth:`of_image`, (B, K).
        """
        half = self.patch_size // 2
        codes = self(pad(image, (half,) * 4, mode='replicate'))
        # Patches lie half a patch apart, so the first row and column include padding.
        rows, cols = ((side - self.patch_size) // half + 1 for side in image.shape[-2:])
        inner = codes[:, :, 1 : 1 + rows, 1 : 1 + cols]
        return adaptive_avg_pool2d(codes, cells).sqrt(), self._pooled(inner, valid)

    def _pooled(self, codes: Tensor, valid: Tensor | None) -> Tensor:
        known = _whole(codes, valid, self.patch_size, self.patch_size // 2)
        if known is None:
            return codes.mean(dim=(2, 3)).sqrt()
        weight = known[:, None].to(codes.dtype)
        total = (codes * weight).sum(dim=(2, 3)) / weight.sum(dim=(2, 3)).clamp_min(1)
        return total.sqrt()


def spherical_kmeans(
    points: Tensor, clusters: int, generator: torch.Generator, iterations: int = _ITERATIONS
) -> Tensor:
    """Cluster unit vectors by their angle.

    Args:
        points: Unit vectors, (N, D).
        clusters: Number of clusters K.
        generator: Generator for drawing initial centres, and new centres of empty clusters.
        iterations: Number of iterations.

    Returns:
        Unit vectors, (K, D).
    """
    draw = torch.randperm(len(points), generator=generator)[:clusters]
    centres = points[draw]
    for _ in range(iterations):
        nearest = torch.cat([(part @ centres.T).argmax(dim=1) for part in points.split(1 << 14)])
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = torch.bincount(nearest, minlength=clusters) == 0
        again = torch.randint(len(points), (int(empty.sum()),), generator=generator)
        total[empty] = points[again]
        centres = normalize(total, dim=1)
    return centres


def _zca(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean of patches and their symmetric whitening matrix."""
    mean = patches.mean(dim=0)
    centred = patches - mean
    variance, directions = torch.linalg.eigh(centred.T @ centred / len(patches))
    scale = (variance.clamp_min(0) + _LEAST_VARIANCE).rsqrt()
    return mean, (directions * scale) @ directions.T


def _whole(patches: Tensor, valid: Tensor | None, size: int, stride: int) -> Tensor | None:
    """Return which patches (B, ..., h, w) have no nodata pixel, bool (B, h, w); None: all."""
    if valid is None:
        return None
    fraction = avg_pool2d(valid[:, None].float(), size, stride)[:, 0]
    return fraction > 1 - 0.5 / size**2 if fraction.shape[-2:] == patches.shape[-2:] else None
