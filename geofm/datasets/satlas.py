"""Land cover of SatlasPretrain as masks for TorchGeo's SemanticSegmentation."""

import hashlib
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Literal, get_args

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchgeo.datasets import SatlasPretrain
from torchgeo.datasets.utils import Path, Sample

#: Side, in Web Mercator tiles, of the blocks that are held out as a whole, since neighbours look
#: alike.
_BLOCK = 8

#: Samples for training, for validation, or all.
Part = Literal['train', 'val', 'all']


class SatlasLandCover(SatlasPretrain):
    """Tiles of SatlasPretrain that have land cover, with their images.

    'mask', int64 (H, W), has 12 classes. 0 means unknown.
    """

    #: Names of the classes.
    classes = (
        'background',
        'water',
        'developed',
        'tree',
        'shrub',
        'grass',
        'crop',
        'bare',
        'snow',
        'wetland',
        'mangroves',
        'moss',
    )

    def __init__(
        self,
        root: Path = 'data',
        part: Part = 'train',
        val: float = 0.1,
        images: tuple[str, ...] = ('sentinel2',),
        split: str = 'train_lowres',
        good_images: str = 'good_images_lowres_all',
        image_times: str = 'image_times',
        transforms: Callable[[Sample], Sample] | None = None,
    ) -> None:
        """Initialize a new SatlasLandCover instance.

        Args:
            root: Folder of the data.
            part: 'train', 'val' or 'all'. Each block of 8 x 8 tiles is in one part.
            val: Fraction of the blocks in 'val', 0 to 1. The selection is deterministic.
            images: Image products.
            split: Name of the list of tiles.
            good_images: Name of the list of the images of each tile.
            image_times: Name of the list of the times of the images.
            transforms: Applied to each sample.

        Raises:
            DatasetNotFoundError: If the data are not in *root*.
            ValueError: If an argument is out of range, or the part has no tile with land cover.
        """
        if part not in get_args(Part):
            raise ValueError(f"unknown part '{part}': choose from {list(get_args(Part))}")
        if not 0 <= val < 1:
            raise ValueError(f'val must be a fraction of at least 0 and less than 1, not {val}')
        super().__init__(root, split, good_images, image_times, images, ('land_cover',), transforms)
        static = FilePath(root) / 'static'
        kept = [
            (static / f'{col}_{row}' / 'land_cover.png').is_file()
            and (part == 'all' or (part == 'val') == (_draw(col // _BLOCK, row // _BLOCK) < val))
            for col, row in zip(self.split['col'], self.split['row'], strict=True)
        ]
        every = len(self.split)
        self.split = self.split[kept].reset_index(drop=True)
        if not len(self.split):
            raise ValueError(
                f"{root}: none of {every} tiles of '{split}' has land cover and is in part "
                f"'{part}' (val={val})"
            )

    def __getitem__(self, index: int) -> Sample:
        """Read a sample.

        Args:
            index: Index of the sample.

        Returns:
            The sample of SatlasPretrain, with 'mask' in the size of the images.
        """
        transforms, self.transforms = self.transforms, None
        try:
            sample = super().__getitem__(index)
        finally:
            self.transforms = transforms
        sample['mask'] = _resized(sample.pop('mask_land_cover'), self.chip_size)
        return sample if transforms is None else transforms(sample)

    def plot(self, sample: Sample, show_titles: bool = True, suptitle: str | None = None) -> Figure:
        """Draw the land cover of a sample, and the prediction if there is one.

        Args:
            sample: Sample with 'mask' and optionally 'prediction', (H, W).
            show_titles: Whether to show a title above each panel.
            suptitle: Title of the figure.

        Returns:
            The figure.
        """
        shown = [key for key in ('mask', 'prediction') if key in sample]
        figure, axes = plt.subplots(ncols=len(shown), squeeze=False)
        for ax, key in zip(axes[0], shown, strict=True):
            ax.imshow(sample[key], cmap='tab20', vmin=0, vmax=len(self.classes) - 1)
            ax.axis('off')
            if show_titles:
                ax.set_title({'mask': 'Land cover', 'prediction': 'Prediction'}[key])
        if suptitle is not None:
            figure.suptitle(suptitle)
        return figure


def _resized(mask: Tensor, size: int) -> Tensor:
    """Resize a mask to the size of the images, by the nearest pixel."""
    if tuple(mask.shape) == (size, size):
        return mask
    rows, cols = ((torch.arange(size) * side // size) for side in mask.shape)
    return mask[rows[:, None], cols]


def _draw(col: int, row: int) -> float:
    """Return a number from 0 to 1 that is a fixed hash of a block."""
    digest = hashlib.blake2b(f'{col} {row}'.encode(), digest_size=4).digest()
    return int.from_bytes(digest) / 2**32
