"""Elevation from Sentinel-1: MMFlood with its elevation model as the target."""

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torchgeo.datamodules import GeoDataModule, MMFloodDataModule
from torchgeo.datasets import MMFlood
from torchgeo.datasets.utils import GeoSlice, Sample
from torchgeo.samplers import GriddedPatchSampler, RandomPatchSampler

from geofm.datamodules.hooks import PlacesStay

#: Median and standard deviation of the elevation in metres, from TorchGeo's statistics of MMFlood.
MEDIAN, STD = (float(values[2]) for values in (MMFloodDataModule.median, MMFloodDataModule.std))


class MMFloodHeight(MMFlood):
    """MMFlood (Montello et al., 2022) with its elevation model in place of the flood mask.

    The 'image' of a sample is VV and VH of Sentinel-1 in linear power, with NaN for pixels without
    data. The 'mask' is the elevation, standardised with the median and standard deviation of
    MMFlood. Missing pixels have the mean of the window, since TorchGeo's task cannot ignore them.
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
            'image' float32 (2, H, W), 'mask' float32 (H, W), and the further entries of
            ``MMFlood``.
        """
        # Not that of MMFlood, which fills missing pixels with 0, also in the elevation.
        sample = super(MMFlood, self).__getitem__(index)
        power, elevation = sample['image'].tensor_split([2])
        elevation = elevation[0]
        known = (power > 0).all(dim=0) & elevation.isfinite()
        sample['image'] = power.masked_fill(~known, float('nan'))
        fill = elevation[known].mean() if known.any() else MEDIAN
        sample['mask'] = (elevation.where(known, fill) - MEDIAN) / STD
        return sample

    def plot(self, sample: Sample, *_: Any, **__: Any) -> Figure:
        """Plot VV, the elevation, and the prediction if there is one.

        Args:
            sample: A sample with 'image' in dB.

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
    """Windows of :class:`MMFloodHeight`, with the splits of MMFlood.

    Wrap it in :class:`geofm.datamodules.NamedBandsDataModule`, which converts Sentinel-1 to dB and
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
            length: Number of windows per training epoch.
            num_workers: Number of worker processes that read samples.
            **kwargs: Further arguments of ``MMFlood``.
        """
        super().__init__(MMFloodHeight, batch_size, patch_size, length, num_workers, **kwargs)

    def setup(self, stage: str) -> None:
        """Make the data sets of a stage.

        Args:
            stage: Either 'fit', 'validate' or 'test'.

        Raises:
            ValueError: If no tile is large enough for a training window.
        """
        size = self.patch_size
        if stage == 'fit':
            self.train_dataset = MMFloodHeight(split='train', **self.kwargs)
            self.train_sampler = RandomPatchSampler(
                self.train_dataset, size=size, length=self.length
            )
            if self.train_sampler.series.is_empty.all():
                raise ValueError(
                    f'no tile of {self.train_dataset.root} is large enough for a window of {size} '
                    'px at any angle: choose a smaller patch_size'
                )
        if stage in ('fit', 'validate'):
            self.val_dataset = MMFloodHeight(split='val', **self.kwargs)
            self.val_sampler = GriddedPatchSampler(self.val_dataset, size=size, stride=size)
        if stage == 'test':
            self.test_dataset = MMFloodHeight(split='test', **self.kwargs)
            self.test_sampler = GriddedPatchSampler(self.test_dataset, size=size, stride=size)
