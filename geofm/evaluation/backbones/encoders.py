"""Encoders: the features of each kind of backbone for a prepared batch."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from geofm.models import MultiSensorViT, PatchWords

#: Number of last blocks whose tokens the linear probe may use, as in DINOv2.
LAST_BLOCKS = 4

#: Name of the standard deviation over the patches of an image.
STD = 'std of patches'

#: Side in pixels of the cells of the band statistics, the baseline of dense tasks.
CELL = 16


class Encoder(nn.Module):
    """Features of images.

    Attributes:
        features: Indices of the vectors that are concatenated, by name of the pooled features.
        inputs: Indices of the vectors that are concatenated, by name of the linear probe's input.
        gives_patches: Whether :meth:`patches` is available.
    """

    features: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, tuple[int, ...]]
    gives_patches: bool = True

    def learn(self, batches: Iterable[Mapping[str, Any]], images: int, seed: int) -> None:
        """Fit the encoder to the images of the training split. Most encoders need no fitting.

        Args:
            batches: Prepared batches without labels, which are read lazily.
            images: Number of images in the batches.
            seed: Seed of random draws.

        Raises:
            ValueError: If there are too few images.
        """

    def pooled(self, batch: Mapping[str, Any]) -> Tensor:
        """Compute vectors of images.

        Args:
            batch: A prepared batch.

        Returns:
            Vectors of shape (B, V, D).
        """
        raise NotImplementedError

    def patches(self, batch: Mapping[str, Any]) -> Tensor:
        """Compute a map of features.

        Args:
            batch: A prepared batch.

        Returns:
            Features of shape (B, D, h, w).
        """
        raise NotImplementedError


class ViTEncoder(Encoder):
    """Encoder of a vision transformer: CLS tokens and patch tokens of its last four blocks.

    The vectors are the CLS token of the last block, the mean of its patch tokens, then the CLS
    tokens of the preceding blocks from last to first, as in DINOv2's linear probe. For a model
    without a CLS token, they are the means of the patch tokens. The last vector is the standard
    deviation over the patch tokens of the last block, which describes how varied an image is.

    Args:
        vit: A ViT of this project or of timm, in evaluation mode.
    """

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit
        model: Any = vit
        depth = model.depth if isinstance(vit, MultiSensorViT) else len(model.blocks)
        self.blocks = min(LAST_BLOCKS, depth)
        self.has_cls = bool(
            getattr(model, 'has_class_token', getattr(model, 'cls_token', None) is not None)
        )
        last = 'last block' if self.blocks == 1 else f'last {self.blocks} blocks'
        earlier = tuple(range(2, 1 + self.blocks))
        if self.has_cls:
            self.features = {
                'CLS token': (0,),
                'mean of patches': (1,),
                STD: (1 + self.blocks,),
                'CLS and mean of patches': (0, 1),
            }
            inputs: dict[str, tuple[int, ...]] = {
                'CLS of the last block': (0,),
                'CLS and mean of patches of the last block': (0, 1),
            }
            if earlier:
                inputs[f'CLS of the {last}'] = (0, *earlier)
                inputs[f'CLS of the {last}, mean of patches'] = (0, 1, *earlier)
        else:
            self.features = {'mean of patches': (0,), STD: (self.blocks,)}
            inputs = {'mean of patches of the last block': (0,)}
            if self.blocks > 1:
                inputs[f'mean of patches of the {last}'] = tuple(range(self.blocks))
        self.inputs = inputs

    def _tokens(
        self, batch: Mapping[str, Any], blocks: int, output_fmt: str
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return patch tokens and prefix tokens of the last blocks, from last to first."""
        model: Any = self.vit
        ours = isinstance(self.vit, MultiSensorViT)
        extra = {'dates': batch.get('dates')} if ours else {}
        prefixed = ours or model.num_prefix_tokens > 0
        taken = model.forward_intermediates(
            batch['image'],
            indices=blocks,
            return_prefix_tokens=prefixed,
            norm=True,
            output_fmt=output_fmt,
            intermediates_only=True,
            **extra,
        )
        return [tokens if prefixed else (tokens, None) for tokens in reversed(taken)]

    def pooled(self, batch: Mapping[str, Any]) -> Tensor:
        """Compute the vectors of a batch, (B, V, D), see the class."""
        tokens = self._tokens(batch, self.blocks, 'NLC')
        std = tokens[0][0].std(dim=1, correction=0)
        if not self.has_cls:
            return torch.stack([*(patches.mean(dim=1) for patches, _ in tokens), std], dim=1)
        cls = [prefix[:, 0] for _, prefix in tokens if prefix is not None]
        return torch.stack([cls[0], tokens[0][0].mean(dim=1), *cls[1:], std], dim=1)

    def patches(self, batch: Mapping[str, Any]) -> Tensor:
        """Compute the patch tokens of the last block, (B, D, h, w)."""
        return self._tokens(batch, 1, 'NCHW')[0][0]


class PooledEncoder(Encoder):
    """Encoder of models other than ViTs: pooled features, and the last feature map if timm has it.

    Args:
        model: The model without its head, in evaluation mode.
    """

    features: Mapping[str, tuple[int, ...]] = {'': (0,)}
    inputs: Mapping[str, tuple[int, ...]] = {'pooled features': (0,)}

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.gives_patches = hasattr(model, 'forward_intermediates')

    def pooled(self, batch: Mapping[str, Any]) -> Tensor:
        """Compute the output of the model, (B, 1, D)."""
        output: Tensor = self.model(batch['image'])
        if output.ndim != 2:
            raise ValueError(
                f'{type(self.model).__name__} returns {tuple(output.shape)}, not one vector per '
                'image'
            )
        return output[:, None]

    def patches(self, batch: Mapping[str, Any]) -> Tensor:
        """Compute the last feature map, (B, D, h, w)."""
        model: Any = self.model
        return model.forward_intermediates(
            batch['image'], indices=1, intermediates_only=True, output_fmt='NCHW'
        )[-1]


class PatchWordsEncoder(Encoder):
    """Encoder of bags of patch words: the square root of the mean code of an image's patches."""

    features: Mapping[str, tuple[int, ...]] = {'': (0,)}
    inputs: Mapping[str, tuple[int, ...]] = {'mean of patch words': (0,)}

    def __init__(self, words: PatchWords) -> None:
        """Initialize a new PatchWordsEncoder instance.

        Args:
            words: The words.
        """
        super().__init__()
        self.words = words

    def learn(self, batches: Iterable[Mapping[str, Any]], images: int, seed: int) -> None:
        """Fit the patch words, see :meth:`Encoder.learn`."""
        self.words.fit(batches, images, seed)

    def pooled(self, batch: Mapping[str, Any]) -> Tensor:
        """Compute the pooled codes of the patches without missing pixels, (B, 1, K)."""
        return self.words.of_image(batch['image'], batch.get('valid'))[:, None]

    def patches(self, batch: Mapping[str, Any]) -> Tensor:
        """Compute codes averaged over cells of the size of a patch, (B, K, h, w)."""
        image: Tensor = batch['image']
        size = self.words.patch_size
        height, width = (max(1, side // size) for side in image.shape[-2:])
        return self.words.on_grid(image, (height, width))[0]


class StatisticsEncoder(Encoder):
    """Encoder of band statistics over the valid pixels: a baseline for any model."""

    features: Mapping[str, tuple[int, ...]] = {'': (0,)}
    inputs: Mapping[str, tuple[int, ...]] = {'mean and std of bands': (0,)}

    def pooled(self, batch: Mapping[str, Any]) -> Tensor:
        """Compute the statistics of images, (B, 1, 2C)."""
        return band_statistics_encoder(batch)[:, None]

    def patches(self, batch: Mapping[str, Any]) -> Tensor:
        """Compute the statistics of cells of 16 px, (B, 2C, h, w), over all of their pixels."""
        image: Tensor = batch['image']
        height, width = (max(1, round(side / CELL)) for side in image.shape[-2:])
        grid = (height, width)
        mean = adaptive_avg_pool2d(image, grid)
        square = adaptive_avg_pool2d(image.square(), grid)
        return torch.cat([mean, (square - mean.square()).clamp_min(0).sqrt()], dim=1)


def band_statistics_encoder(batch: Mapping[str, Any]) -> Tensor:
    """Compute the mean and standard deviation of every band over the valid pixels.

    Args:
        batch: Batch with ``image`` of shape (B, C, H, W) and optionally ``valid`` of shape
            (B, H, W).

    Returns:
        Features of shape (B, 2C).
    """
    image: Tensor = batch['image']
    valid = batch['valid'][:, None] if 'valid' in batch else torch.ones_like(image[:, :1])
    valid = valid.to(image.dtype)
    count = valid.sum(dim=(2, 3)).clamp_min(1)
    mean = (image * valid).sum(dim=(2, 3)) / count
    deviation = (image - mean[..., None, None]) * valid
    return torch.cat([mean, (deviation.square().sum(dim=(2, 3)) / count).sqrt()], dim=1)
