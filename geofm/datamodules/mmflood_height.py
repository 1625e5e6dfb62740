"""Elevation of the ground from Sentinel-1: MMFlood with its elevation model as the target."""

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torchgeo.datamodules import GeoDataModule, MMFloodDataModule
from torchgeo.datasets import MMFlood
from torchgeo.datasets.utils import GeoSlice, Sample
from torchgeo.samplers import GriddedPatchSampler, RandomPatchSampler

from geofm.datamodules.transfer import PlacesStay

#: Median and standard deviation of elevations in metres, as TorchGeo has them of MMFlood.
MEDIAN, STD = (float(values[2]) for values in (MMFloodDataModule.median, MMFloodDataModule.std))


class MMFloodHeight(MMFlood):
    """MMFlood (Montello et al., 2022), its elevation model in place of the flood mask.

    A sample's 'image' is Sentinel-1, linear power, VV and VH; NaN where there is none. Its 'mask'
    is the elevation, less the median of MMFlood and divided by its standard deviation; where data
    are missing it is the mean of the window, as TorchGeo's task cannot leave pixels out.
    """

    def __init__(self, **kwargs: Any) -> None:
        """Initialize a new MMFloodHeight instance.

        Args:
            **kwargs: Arguments of ``MMFlood``.
        """
        super().__init__(**{**kwargs, 'include_dem': True})

    def __getitem__(self, index: GeoSlice) -> Sample:
        """Read a window.

        Args:
            index: Window in space and time.

        Returns:
            Image float32 (2, H, W) and mask float32 (H, W), and what else ``MMFlood`` yields.
        """
        # MMFlood's own fills with 0 what is missing, the elevation too.
        sample = super(MMFlood, self).__getitem__(index)
        power, elevation = sample['image'].tensor_split([2])
        elevation = elevation[0]
        known = (power > 0).all(dim=0) & elevation.isfinite()
        sample['image'] = power.masked_fill(~known, float('nan'))
        fill = elevation[known].mean() if known.any() else MEDIAN
        sample['mask'] = (elevation.where(known, fill) - MEDIAN) / STD
        return sample

    def plot(self, sample: Sample, *_: Any, **__: Any) -> Figure:
        """Draw VV, the elevation, and where given the prediction.

        Args:
            sample: One sample, 'image' in dB.

        Returns:
            The figure.
        """
        panels = {'VV in dB': sample['image'][0]}
        panels |= {
            f'{key} in m': sample[key].squeeze() * STD + MEDIAN
            for key in ('mask', 'prediction')
            if key in sample
        }
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4 * len(panels), 4), layout='constrained'
        )
        for ax, (title, values) in zip(axes, panels.items(), strict=True):
            figure.colorbar(ax.imshow(values.detach().cpu().float()), ax=ax, shrink=0.7)
            ax.set_title(title)
            ax.axis('off')
        return figure


class MMFloodHeightDataModule(PlacesStay, GeoDataModule):
    """Windows of :class:`MMFloodHeight`, by the splits of MMFlood.

    Give it to :class:`geofm.datamodules.NamedBandsDataModule`, which brings Sentinel-1 to dB and
    normalises it.
    """

    def __init__(
        self,
        batch_size: int = 32,
        patch_size: int = 512,
        length: int | None = None,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> None:
        """Initialize a new MMFloodHeightDataModule instance.

        Args:
            batch_size: Number of windows in a batch.
            patch_size: Side of a window in pixels.
            length: Number of windows in an epoch of training.
            num_workers: Number of processes that read.
            **kwargs: Further arguments of ``MMFlood``.
        """
        super().__init__(MMFloodHeight, batch_size, patch_size, length, num_workers, **kwargs)

    def setup(self, stage: str) -> None:
        """Make the data sets of a stage.

        Args:
            stage: Either 'fit', 'validate' or 'test'.

        Raises:
            ValueError: If no tile is large enough for a window to train on.
        """
        size = self.patch_size
        if stage == 'fit':
            self.train_dataset = MMFloodHeight(split='train', **self.kwargs)
            self.train_sampler = RandomPatchSampler(
                self.train_dataset, size=size, length=self.length
            )
            if self.train_sampler.series.is_empty.all():
                raise ValueError(
                    f'no tile of {self.train_dataset.root} holds a window of {size} px at any '
                    'angle: choose a smaller patch_size'
                )
        if stage in ('fit', 'validate'):
            self.val_dataset = MMFloodHeight(split='val', **self.kwargs)
            self.val_sampler = GriddedPatchSampler(self.val_dataset, size=size, stride=size)
        if stage == 'test':
            self.test_dataset = MMFloodHeight(split='test', **self.kwargs)
            self.test_sampler = GriddedPatchSampler(self.test_dataset, size=size, stride=size)
