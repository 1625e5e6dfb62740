"""Bags of patch words: a baseline without labels, gradients or a network."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from geofm.evaluation.encoders import Encoder
from geofm.models.patch_words import PatchWords


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
