"""Labelled data to evaluate backbones on: the splits of any data module, with named bands."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchgeo.datamodules import BaseDataModule, GeoDataModule
from torchgeo.datasets.utils import Sample

from geofm.datamodules import NamedBandsDataModule
from geofm.datasets import pad_and_stack
from geofm.evaluation.data.naming import (
    SELECTIONS,
    Windows,
    innermost,
    named,
    normalisation_line,
    source_of,
    title_of,
)
from geofm.evaluation.data.paired import PairedDataModule
from geofm.models.checkpoints import hash_tensors
from geofm.sensors import band_statistics, sensor_of
from geofm.units import UnitWatch

#: Maximum value of a class in a mask. Higher values are probably nodata values.
HIGHEST_CLASS = 255

#: Distance of the highest value from the others above which it is probably not a class, if it is
#: also more than 4 times the largest distance between the others.
_ISOLATED = 32

#: Number of images whose units are checked.
_CHECKED = 16


def class_labels(label: Tensor, source: str) -> Tensor:
    """Check the labels of a batch.

    Args:
        label: Labels of a batch: classes (B,) or (B, 1), or 0 and 1 (B, C) of multi-label data.
        source: Name of the data set in messages.

    Returns:
        Classes int64 (B,), or 0 and 1 int64 (B, C).

    Raises:
        ValueError: If labels have another shape, are not integers, are negative, or, for
            multi-label data, are not 0 or 1.
    """
    if label.is_floating_point() or label.ndim not in (1, 2):
        raise ValueError(
            f'{source}: labels of shape {tuple(label.shape)} and {label.dtype}: an integer class '
            'per image is needed, or 0 and 1 per class'
        )
    label = label.long()
    if label.ndim == 2 and label.shape[1] == 1:
        label = label[:, 0]
    if label.ndim == 2:
        wrong = label[(label != 0) & (label != 1)]
        if len(wrong):
            raise ValueError(
                f'{source}: label {wrong[0].item()}: labels of multi-label data must be 0 or 1. '
                'Remove images with unknown labels'
            )
    elif len(label) and label.min() < 0:
        raise ValueError(
            f'{source}: label {label.min().item()} is not a class: classes are numbered from 0. '
            'Remove images without a label from the data set'
        )
    return label


def class_mask(mask: Tensor, ignore_index: int, source: str) -> Tensor:
    """Check the masks of a batch.

    Args:
        mask: Masks (B, H, W). Negative values are padding outside an image.
        ignore_index: Value of pixels that are ignored.
        source: Name of the data set in messages.

    Returns:
        Classes int64 (B, H, W), with *ignore_index* instead of padding.

    Raises:
        ValueError: If a value is too high for a class.
    """
    mask = mask.long()
    mask = mask.masked_fill(mask < 0, ignore_index)
    counted = mask[mask != ignore_index]
    if counted.numel() and counted.max() > HIGHEST_CLASS:
        raise ValueError(
            f'{source}: masks have the value {counted.max().item()}, which is probably not a '
            'class. If it means no data, set ignore_index to it'
        )
    return mask


def number_of_classes(values: Tensor, named: int, source: str, advice: str, trust: bool) -> int:
    """Return the number of classes of labels or masks.

    Args:
        values: Classes that occur, without ignored pixels.
        named: Number of classes that have a name; 0 if the names are unknown.
        source: Name of the data set in messages.
        advice: Advice for a value that is probably not a class.
        trust: Whether a value far above all others is accepted as a class.

    Returns:
        One more than the highest class, or *named* if that is more.

    Raises:
        ValueError: If there are less than two classes, or if a value is probably not a class.
    """
    seen = values.unique()
    if len(seen) < 2:
        raise ValueError(
            f'{source}: all labels are {seen.tolist()}: at least two classes are needed'
        )
    highest = int(seen[-1])
    # Some data sets number their named classes from 1.
    if named and highest > named:
        raise ValueError(
            f'{source}: a label of {highest}, but only {named} classes have names. {advice}'
        )
    if not trust and not named:
        gaps = seen.diff(prepend=torch.zeros(1, dtype=seen.dtype))
        last, others = int(gaps[-1]), int(gaps[:-1].max())
        if last > _ISOLATED and last > 4 * others:
            raise ValueError(
                f'{source}: a label of {highest}, far above all others (up to '
                f'{int(seen[-2])}), is probably not a class. {advice}'
            )
    return max(highest + 1, named)


#: What is predicted for an image.
Task = Literal['classification', 'multilabel', 'segmentation', 'regression']

#: Splits of the data: for training, for model selection, and for the report.
Split = Literal['train', 'val', 'test']
SPLITS: tuple[Split, ...] = get_args(Split)

#: Default value of pixels of a mask that are ignored.
IGNORE = 255

#: Number of samples of a split whose content is part of its fingerprint.
_SAMPLED = 16


@dataclass
class LabelledData:
    """Splits of labelled data.

    Attributes:
        name: Name of the data.
        task: What is predicted.
        bands: Names of the channels of 'image', with S1 in dB and S2 in DN.
        splits: Data set of each split.
        batch_size: Number of samples per batch.
        num_workers: Number of worker processes of data loaders.
        collate_fn: Function that collates samples into a batch.
        ignore_index: Value of pixels that are ignored.
        says_nodata: Whether *ignore_index* was set by the user.
        classes: Names of the classes, if known.
        statistics: Mean and standard deviation of each band, given by the user. They take
            precedence over those of the backbone, which are used for other bands.
        notes: Notes on the data for the report.
        map_masks: Function of the data module that maps the masks of a batch.
    """

    name: str
    task: Task
    bands: tuple[str, ...]
    splits: dict[Split, Dataset[Any]]
    batch_size: int
    num_workers: int = 0
    collate_fn: Callable[[Any], Any] = default_collate
    ignore_index: int = IGNORE
    says_nodata: bool = False
    classes: tuple[str, ...] = ()
    statistics: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    map_masks: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda batch: batch

    @property
    def dense(self) -> bool:
        """Whether targets are maps."""
        return self.task in ('segmentation', 'regression')

    def size(self, split: Split) -> int:
        """Return the number of samples of a split."""
        dataset = self.splits[split]
        assert isinstance(dataset, Sized)
        return len(dataset)

    def loader(self, split: Split) -> DataLoader[Sample]:
        """Return a data loader of all samples of a split, in order.

        Args:
            split: The split.

        Returns:
            The data loader. Images are raw and have the channels :attr:`bands`.
        """
        return DataLoader(
            self.splits[split],
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
        )

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the targets of a batch.

        Args:
            batch: A batch of :meth:`loader`.

        Returns:
            For classification, classes int64 (B,); for multi-label classification, 0 and 1 int64
            (B, classes); for segmentation, int64 maps (B, H, W) with :attr:`ignore_index` where the
            class is unknown; for regression, float32 maps (B, H, W) with NaN where the value is
            unknown.

        Raises:
            ValueError: If a target is invalid.
        """
        key = 'mask' if self.dense else 'label'
        target: Tensor = batch[key]
        if self.dense:
            # A copy, because some of TorchGeo's data modules change masks in place.
            target = self.map_masks({**batch, 'mask': target.clone()})['mask']
            # Masks of TorchGeo have an axis of one channel or none.
            target = target.squeeze(1) if target.ndim == 4 else target
            if self.task == 'regression':
                return target.float()
            # pad_and_stack pads masks with -1.
            return class_mask(target, self.ignore_index, self.name)
        return class_labels(target, self.name)

    def fingerprint(self, split: Split) -> str:
        """Hash the source, the number and some samples of a split.

        Args:
            split: The split.

        Returns:
            SHA-256 in hexadecimal.
        """
        dataset = self.splits[split]
        size = self.size(split)
        places = torch.linspace(0, size - 1, min(_SAMPLED, size)).long().unique().tolist()
        parts = [_identity(dataset), split, self.task, str(size), str(self.bands)]
        for sample in (dataset[i] for i in places):
            tensors = {k: v for k, v in sample.items() if isinstance(v, Tensor)}
            parts.append(hash_tensors(tensors))
        return hashlib.sha256('\n'.join(parts).encode()).hexdigest()


def labelled_data(
    datamodule: BaseDataModule,
    task: Task | None = None,
    ignore_index: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> LabelledData:
    """Set up the labelled data of a data module.

    Args:
        datamodule: A data module of TorchGeo or geofm whose samples have a 'label' or a 'mask'. Its
            channels must be listed in :mod:`geofm.evaluation.data.sources`, or named by
            :class:`geofm.datamodules.NamedBandsDataModule`.
        task: What is predicted. None: the label of the samples if they have one, otherwise the
            mask.
        ignore_index: Value of pixels of class maps that are ignored. None: 255.
        limit: Maximum number of samples per split, drawn with *seed*.
        seed: Seed of random draws of windows, held-out samples, and limited samples.

    Returns:
        The data.

    Raises:
        BandError: If the channels are unknown.
        ValueError: If the samples have no suitable target, or splits are missing.
    """
    datamodule.prepare_data()
    for stage in ('fit', 'test'):
        datamodule.setup(stage)
    sources = _sources(datamodule)
    title = ' and '.join(title_of(source) for source in sources)
    notes: list[str] = []
    raw = {split: _split(datamodule, split, seed) for split in SPLITS}
    splits = _complete(raw, title, seed, notes)
    for source in sources:
        notes += _describe(source, _split(source, 'train', seed))
    splits = {split: named(dataset, title) for split, dataset in splits.items()}
    if limit is not None:
        splits = {split: _limited(dataset, limit, seed) for split, dataset in splits.items()}
    bands = tuple(innermost(splits['train'], SELECTIONS).bands)
    _check_units(splits['train'], bands, title)
    sample = splits['train'][0]
    return LabelledData(
        name=title.replace('DataModule', ''),
        task=_task(sample, task, title),
        bands=bands,
        splits=splits,
        batch_size=datamodule.batch_size or 64,
        num_workers=datamodule.num_workers,
        collate_fn=_collate(sources[0]),
        ignore_index=IGNORE if ignore_index is None else ignore_index,
        says_nodata=ignore_index is not None,
        classes=_classes_of(sources[0]),
        statistics=_statistics(datamodule),
        notes=notes,
        map_masks=_mask_map(sources[0]),
    )


def _check_units(dataset: Dataset[Any], bands: Sequence[str], title: str) -> None:
    """Warn if the first images are in other units than those of their sensors."""
    # NamedBands checks backscatter itself: the advice depends on its arguments.
    channels = [i for i, band in enumerate(bands) if sensor_of(band).unit != 'dB']
    if not channels:
        return
    watch = UnitWatch([bands[i] for i in channels], title)
    for number in range(min(len(dataset), _CHECKED)):  # type: ignore[arg-type]
        watch.look(dataset[number]['image'][..., channels, :, :].numpy())


def _sources(datamodule: BaseDataModule) -> list[BaseDataModule]:
    """Return the data modules inside a wrapper. The first one has the targets."""
    if isinstance(datamodule, PairedDataModule):
        return [*_sources(datamodule.first), *_sources(datamodule.second)]
    if isinstance(datamodule, NamedBandsDataModule) and datamodule.source is not None:
        return [datamodule.source]
    return [datamodule]


def _describe(source: BaseDataModule, dataset: Dataset[Any] | None) -> list[str]:
    """Return notes on a data module of TorchGeo for the report."""
    if _ours(source) or dataset is None:
        return []
    known = source_of(dataset)
    note = [f'{title_of(source)}: {known.note}'] if known is not None and known.note else []
    return [normalisation_line(source, dataset), *note]


def _collate(source: BaseDataModule) -> Callable[[Any], Any]:
    if isinstance(source, GeoDataModule):
        # Windows at the edges of images are smaller.
        return pad_and_stack
    return getattr(source, 'collate_fn', default_collate)


def _classes_of(source: BaseDataModule) -> tuple[str, ...]:
    return tuple(getattr(innermost(source.train_dataset), 'classes', ()))


def _ours(datamodule: BaseDataModule) -> bool:
    return type(datamodule).__module__.startswith('geofm.')


def _split(datamodule: BaseDataModule, split: Split, seed: int) -> Dataset[Any] | None:
    dataset: Dataset[Any] | None = getattr(datamodule, f'{split}_dataset')
    (source, *_) = _sources(datamodule)
    if dataset is None or not isinstance(source, GeoDataModule):
        return dataset
    names = (f'{split}_batch_sampler', f'{split}_sampler', 'batch_sampler', 'sampler')
    return Windows(dataset, source._valid_attribute(*names), seed)


def _complete(
    raw: Mapping[Split, Dataset[Any] | None], title: str, seed: int, notes: list[str]
) -> dict[Split, Dataset[Any]]:
    """Return all three splits, deriving missing splits from the others."""
    train, val, test = (raw[split] for split in SPLITS)
    if train is None or (val is None and test is None):
        raise ValueError(f'{title}: a training split and a validation or test split are needed')
    if test is None:
        notes.append(f'{title}: no test split; metrics are of the validation split')
        test, val = val, None
    if val is None:
        assert isinstance(train, Sized)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        held = max(1, len(train) // 5)
        notes.append(f'{title}: {held} of {len(train)} training samples are held out as validation')
        train, val = Subset(train, sorted(order[held:])), Subset(train, sorted(order[:held]))
    assert test is not None
    return {'train': train, 'val': val, 'test': test}


def _limited(dataset: Dataset[Any], limit: int, seed: int) -> Dataset[Any]:
    assert isinstance(dataset, Sized)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, sorted(order[:limit].tolist()))


def _statistics(datamodule: BaseDataModule) -> dict[str, tuple[float, float]]:
    """Return the mean and standard deviation by band that the user gave to the data module."""
    if not isinstance(datamodule, NamedBandsDataModule):
        return {}
    mean, std = band_statistics(datamodule.bands)
    if torch.equal(mean, datamodule.mean) and torch.equal(std, datamodule.std):
        return {}
    values = zip(datamodule.mean.tolist(), datamodule.std.tolist(), strict=True)
    return dict(zip(datamodule.bands, values, strict=True))


def _task(sample: Mapping[str, Any], asked: Task | None, title: str) -> Task:
    """Return what is predicted for a sample."""
    label, mask = sample.get('label'), sample.get('mask')
    found: set[Task] = set()
    if isinstance(label, Tensor) and not label.is_floating_point():
        found.add('classification' if label.numel() == 1 else 'multilabel')
    if isinstance(mask, Tensor):
        found.add('regression' if mask.is_floating_point() else 'segmentation')
    if asked is not None and asked not in found:
        raise ValueError(f"{title}: task '{asked}' is not one of {sorted(found)} of its samples")
    if not found:
        raise ValueError(
            f'{title}: samples have {sorted(sample)}, but neither a label of classes nor a mask'
        )
    return min(found, key=get_args(Task).index) if asked is None else asked


def _mask_map(
    datamodule: BaseDataModule | None,
) -> Callable[[dict[str, Any]], Mapping[str, Any]]:
    """Return the function of a data module that maps masks on the device.

    An example is the mapping of SEN12MS to the classes of DFC2020. Without a trainer, TorchGeo's
    hook applies no augmentation, so it only maps the masks.
    """
    hook = 'on_after_batch_transfer'
    if datamodule is None or getattr(type(datamodule), hook) is getattr(BaseDataModule, hook):
        return lambda batch: batch
    if _ours(datamodule):
        return lambda batch: batch
    return lambda batch: datamodule.on_after_batch_transfer(dict(batch), 0)


def _identity(dataset: Dataset[Any]) -> str:
    """Describe a data set by its class, its plain attributes, and the data sets that it wraps.

    Args:
        dataset: The data set.

    Returns:
        JSON that identifies the data set.
    """
    return json.dumps(_plain(dataset), sort_keys=True)


def _plain(value: Any) -> Any:
    """Convert an attribute to plain data for JSON; None if it is of another type."""
    if isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Path | slice):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Dataset):
        cls = type(value)
        return {'': f'{cls.__module__}.{cls.__qualname__}', **_plain(vars(value))}
    return None
