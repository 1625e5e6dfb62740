"""Data module of a table of rasters with labels of one's own."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchgeo.datasets.utils import Path

from geofm.datamodules.masked_archive import TargetArchiveDataModule
from geofm.datasets.archive.labelled import LabelledArchive, Target
from geofm.datasets.archive.masked import IGNORE
from geofm.legend import LEGEND_TAG, Legend


class LabelledArchiveDataModule(TargetArchiveDataModule):
    """Labels of one's own for any sensors of a table of rasters.

    It feeds TorchGeo's tasks as they are:

    ============ ==========================================================================
    target       task
    ============ ==========================================================================
    segmentation SemanticSegmentation with ``num_classes`` and ``ignore_index``
    regression   PixelwiseRegression; pixels without a label count in no loss and no metric
    multilabel   Classification with ``task: multilabel``, ``loss: bce`` and ``num_labels``
    majority     Classification with ``num_classes``
    ============ ==========================================================================

    The classes are part of the data module's state, and so of every checkpoint.
    """

    def __init__(
        self,
        table: Path,
        sensors: Sequence[str],
        labels: str | dict[str, Any],
        classes: int | list[str] | dict[str, Any] | None = None,
        target: Target = 'segmentation',
        ignore_index: int = IGNORE,
        class_weights: Literal['balanced'] | None = None,
        min_labelled: float = 0.0,
        bands: Sequence[str] | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        split: dict[str, Any] | None = None,
        window_size: int | None = None,
        statistics: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialize a new LabelledArchiveDataModule instance.

        Args:
            table: Table of rasters, as ``geofm index`` writes it.
            sensors: Keys of the sensors of the images.
            labels: The labels: ``{path: labels.gpkg, column: class, all_touched: false}``, where
                *path* is a file of features or pixels, several, or a pattern such as
                ``masks/*.tif``; or a band of the table, such as ``landcover.class``.
            classes: How many classes there are, their names, or their values by name:
                ``{water: 1, forest: {value: 2, color: '#266334'}}``; by default those of the file.
            target: What is to be told: 'segmentation', 'regression', 'multilabel' or 'majority'.
            ignore_index: Value of masks of classes where there is no label.
            class_weights: 'balanced': rare classes count as much as frequent ones in the loss of
                the task, 'ce' or 'bce', by their frequencies in the training split.
            min_labelled: Samples are left out of which less than this fraction is labelled.
            bands: Names of the channels of the images; by default all of the sensors.
            batch_size: Number of samples in a batch.
            num_workers: Number of processes that read.
            split: How samples are split, the fields of
                :class:`~geofm.datasets.splitting.SplitRule`; by default by the column 'split' of
                the table.
            window_size: Height and width of the windows that are laid over each scene; whole
                scenes by default.
            statistics: YAML file with mean and standard deviation of each band, as of
                ``geofm stats``; None for those that the weights in use were trained with, or else
                those of the sensors.
            **kwargs: Further arguments of
                :class:`~geofm.datasets.archive.labelled.LabelledArchive`.

        Raises:
            BandError: If a band is unknown or given twice.
            LegendError: If the classes cannot be used; a ValueError.
            SensorError: If a sensor is unknown.
            ValueError: If another argument cannot be used.
        """
        if class_weights not in (None, 'balanced'):
            raise ValueError(f"class_weights must be 'balanced' or null, not {class_weights!r}")
        if class_weights is not None and target == 'regression':
            raise ValueError('class_weights are for classes: leave them out for regression')
        self._given = None if classes is None or target == 'regression' else Legend.of(classes)
        self.class_weights = class_weights
        self.ignore_index = ignore_index
        self.target: Target = target
        super().__init__(
            LabelledArchive,
            table,
            sensors,
            bands,
            batch_size,
            num_workers,
            split,
            window_size,
            statistics,
            labels=labels,
            classes=classes,
            target=target,
            ignore_index=ignore_index,
            min_labelled=min_labelled,
            **kwargs,
        )

    @property
    def legend(self) -> Legend | None:
        """The classes, as far as they are known yet; None for regression."""
        for split in ('train', 'val', 'test'):
            dataset = getattr(self, f'{split}_dataset', None)
            if isinstance(dataset, LabelledArchive):
                return dataset.legend
        return self._given

    def setup(self, stage: str) -> None:
        """Make the data sets of a stage, and tell the task what it must know of the labels.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.

        Raises:
            ValueError: If the loss of the task takes no class weights, the task is for another
                target, or has another *ignore_index*.
        """
        super().setup(stage)
        if stage == 'fit':
            # TorchGeo drops the last batch if it is not full: of few samples, all would be gone.
            size = self.batch_size or 1
            self.train_batch_size = min(size, len(self.train_dataset))  # type: ignore[arg-type]
            for split, dataset in (('train', self.train_dataset), ('val', self.val_dataset)):
                if isinstance(dataset, LabelledArchive):
                    rank_zero_info(f'{split}: {len(dataset):,} windows with labels')
        task = self.trainer.lightning_module if self.trainer and self.trainer.model else None
        if task is None:
            return
        self._check_task(task)
        if self.target == 'regression':
            count_known_only(task)
        if self.class_weights is not None:
            self._weigh(task, stage)

    def _check_task(self, task: Any) -> None:
        """Check that a task of TorchGeo is for the target, and ignores what has no label."""
        # It takes seconds to import, which whoever has a task has spent.
        from torchgeo.tasks import Classification, Regression, SemanticSegmentation

        of_pixels, name = self.target in ('segmentation', 'regression'), type(task).__name__
        others = (Classification,) if of_pixels else (SemanticSegmentation, Regression)
        if isinstance(task, others):
            raise ValueError(f"target '{self.target}' is not for the task {name}: change either")
        ignored, classes = task.hparams.get('ignore_index'), task.hparams.get('num_classes')
        if self.target != 'segmentation' or ignored == self.ignore_index or not classes:
            return
        if ignored is not None or self.ignore_index < classes:
            raise ValueError(
                f'pixels without a label are {self.ignore_index} in the data, but the task has '
                f'ignore_index={ignored}: give both the same ignore_index'
            )

    def _weigh(self, task: Any, stage: str) -> None:
        """Give the loss of a task the weights of the classes."""
        criterion, multilabel = task.criterion, self.target == 'multilabel'
        kind = nn.BCEWithLogitsLoss if multilabel else nn.CrossEntropyLoss
        if not isinstance(criterion, kind):
            raise ValueError(
                f"class_weights: the loss '{task.hparams.get('loss')}' takes none; set loss to "
                f'{"bce" if multilabel else "ce"}, or leave them out'
            )
        outputs = task.hparams.get('num_labels' if multilabel else 'num_classes')
        weights = torch.ones(int(outputs))
        if stage == 'fit':
            dataset = self.train_dataset
            assert isinstance(dataset, LabelledArchive)
            found = dataset.balanced_weights()
            if len(found) > len(weights):
                raise ValueError(
                    f'{len(found)} classes, but the task has {len(weights)} outputs: set '
                    f'{"num_labels" if multilabel else "num_classes"} to {len(found)}'
                )
            weights[: len(found)] = found
            told = zip(dataset.classes, found.tolist(), strict=True)
            rank_zero_info(
                'Class weights: ' + ', '.join(f'{name} {value:.3g}' for name, value in told)
            )
        # In other stages a checkpoint brings them.
        weights = weights.to(task.device)
        name, argument = ('pos_weight',) * 2 if multilabel else ('weight', 'class_weights')
        setattr(criterion, name, weights)
        # So that a task can be made again of its checkpoint.
        task.hparams[argument] = weights.cpu() if multilabel else weights.tolist()

    def state_dict(self) -> dict[str, Any]:
        """The statistics in use and the classes, for a checkpoint.

        Returns:
            The state.
        """
        legend = self.legend
        state = super().state_dict()
        return state if legend is None else {**state, LEGEND_TAG: legend.entry()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up the statistics of the run that wrote a checkpoint, and compare the classes.

        Args:
            state_dict: As of :meth:`state_dict`.

        Raises:
            ValueError: If they are damaged.
        """
        super().load_state_dict(state_dict)
        legend = self.legend
        if LEGEND_TAG not in state_dict or legend is None:
            return
        other = Legend.from_entry(state_dict[LEGEND_TAG])
        if (other.values, other.names) != (legend.values, legend.names):
            warnings.warn(
                f'the checkpoint was trained with the classes {_told(other)}, but these data have '
                f'{_told(legend)}: the numbers of the two do not mean the same',
                UserWarning,
                stacklevel=2,
            )


def count_known_only(task: Any) -> None:
    """Leave pixels whose target is NaN out of the loss and the metrics of a task.

    Args:
        task: TorchGeo's PixelwiseRegression, or another with 'criterion' and 'train_metrics',
            'val_metrics' and 'test_metrics'. Doing so twice changes nothing.
    """
    for name in ('criterion', 'train_metrics', 'val_metrics', 'test_metrics'):
        module = getattr(task, name, None)
        if isinstance(module, nn.Module):
            module.register_forward_pre_hook(_known_only)


def _known_only(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    prediction, target = args
    known = ~target.isnan()
    return (prediction, target) if known.all() else (prediction[known], target[known])


def _told(legend: Legend) -> str:
    return ', '.join(f'{c.value} {c.name}' for c in legend.classes)
