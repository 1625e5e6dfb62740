"""From a prepared batch to features: what each kind of backbone has to give."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from geofm.models import MultiSensorViT, PatchWords

#: Blocks whose tokens the linear probe may use, as in DINOv2.
LAST_BLOCKS = 4

#: Name of the standard deviation of the patches of an image.
STD = 'std of patches'

#: Side in pixels of the cells whose statistics are the baseline of dense tasks.
CELL = 16


class Encoder(nn.Module):
    """Features of images.

    Attributes:
        features: Kinds of pooled features, by the vectors of the output that are put side by side.
        inputs: What the linear probe chooses from: the vectors that are put side by side.
        gives_patches: Whether :meth:`patches` can be had.
    """

    features: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, tuple[int, ...]]
    gives_patches: bool = True

    def learn(self, batches: Iterable[Mapping[str, Any]], images: int, seed: int) -> None:
        """Learn from the images of the training split, without their labels; most do not.

        Args:
            batches: Prepared batches, read as they are taken.
            images: Number of images in them.
            seed: Seed of what is drawn.

        Raises:
            ValueError: If these images are not enough.
        """

    def pooled(self, batch: Mapping[str, Any]) -> Tensor:
        """Vectors of images.

        Args:
            batch: A prepared batch.

        Returns:
            Of shape (B, V, D).
        """
        raise NotImplementedError

    def patches(self, batch: Mapping[str, Any]) -> Tensor:
        """Features on the ground.

        Args:
            batch: A prepared batch.

        Returns:
            Of shape (B, D, h, w).
        """
        raise NotImplementedError


class ViTEncoder(Encoder):
    """A vision transformer: the CLS token and the patches of its last four blocks.

    The vectors are CLS of the last block, the mean of its patches, then CLS of the blocks before
    it, from the last to the first: the tokens of DINOv2's linear probe. Without CLS they are the
    means of patches. At the end comes the standard deviation of the last block's patches over the
    image: how much of which kinds of ground lies side by side, which a mean does not tell.

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
        """Patches and prefix tokens of the last blocks, the last block first."""
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
        """Vectors of a batch, (B, V, D): see the class."""
        tokens = self._tokens(batch, self.blocks, 'NLC')
        std = tokens[0][0].std(dim=1, correction=0)
        if not self.has_cls:
            return torch.stack([*(patches.mean(dim=1) for patches, _ in tokens), std], dim=1)
        cls = [prefix[:, 0] for _, prefix in tokens if prefix is not None]
        return torch.stack([cls[0], tokens[0][0].mean(dim=1), *cls[1:], std], dim=1)

    def patches(self, batch: Mapping[str, Any]) -> Tensor:
        """Patch tokens of the last block, (B, D, h, w)."""
        return self._tokens(batch, 1, 'NCHW')[0][0]


class PooledEncoder(Encoder):
    """A model of another kind: its pooled features, and the last map if timm gives one.

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
        """What the model returns, (B, 1, D)."""
        output: Tensor = self.model(batch['image'])
        if output.ndim != 2:
            raise ValueError(
                f'{type(self.model).__name__} returns {tuple(output.shape)}, not a vector an image'
            )
        return output[:, None]

    def patches(self, batch: Mapping[str, Any]) -> Tensor:
        """The last map of features, (B, D, h, w)."""
        model: Any = self.model
        return model.forward_intermediates(
            batch['image'], indices=1, intermediates_only=True, output_fmt='NCHW'
        )[-1]


class PatchWordsEncoder(Encoder):
    """Mean of the codes of an image's patches, with the square root taken."""

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
        """As of :meth:`Encoder.learn`: the words."""
        self.words.fit(batches, images, seed)

    def pooled(self, batch: Mapping[str, Any]) -> Tensor:
        """Codes over the patches without missing pixels, (B, 1, K)."""
        return self.words.of_image(batch['image'], batch.get('valid'))[:, None]

    def patches(self, batch: Mapping[str, Any]) -> Tensor:
        """Codes averaged over cells of the size of a patch, (B, K, h, w)."""
        image: Tensor = batch['image']
        size = self.words.patch_size
        height, width = (max(1, side // size) for side in image.shape[-2:])
        return self.words.on_grid(image, (height, width))[0]


class StatisticsEncoder(Encoder):
    """Mean and standard deviation of every band over the valid pixels: a baseline for any model."""

    features: Mapping[str, tuple[int, ...]] = {'': (0,)}
    inputs: Mapping[str, tuple[int, ...]] = {'mean and std of bands': (0,)}

    def pooled(self, batch: Mapping[str, Any]) -> Tensor:
        """Statistics of the images, (B, 1, 2C)."""
        return band_statistics_encoder(batch)[:, None]

    def patches(self, batch: Mapping[str, Any]) -> Tensor:
        """Statistics of cells of 16 px, (B, 2C, h, w); valid is taken for granted."""
        image: Tensor = batch['image']
        height, width = (max(1, round(side / CELL)) for side in image.shape[-2:])
        grid = (height, width)
        mean = adaptive_avg_pool2d(image, grid)
        square = adaptive_avg_pool2d(image.square(), grid)
        return torch.cat([mean, (square - mean.square()).clamp_min(0).sqrt()], dim=1)


def band_statistics_encoder(batch: Mapping[str, Any]) -> Tensor:
    """Mean and standard deviation of every band over the valid pixels.

    Args:
        batch: Normalised ``image`` of shape (B, C, H, W), and where known ``valid`` of shape
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
