"""Data module of a table of rasters with user-defined labels."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchgeo.datasets.utils import Path

from geofm.datamodules.masked_archive import TargetArchiveDataModule
from geofm.datasets.archive import IGNORE, LabelledArchive, Target
from geofm.legend import LEGEND_TAG, Legend
from geofm.printing import counted, warn


class LabelledArchiveDataModule(TargetArchiveDataModule):
    """Table of rasters with user-defined labels, for TorchGeo's tasks.

    Each target has its task:

    * 'segmentation': SemanticSegmentation with ``num_classes`` and ``ignore_index``
    * 'regression': PixelwiseRegression; losses and metrics ignore pixels without a label
    * 'multilabel': Classification with ``task: multilabel``, ``loss: bce`` and ``num_labels``
    * 'majority': Classification with ``num_classes``

    The classes are part of the state of the data module, and therefore of checkpoints.
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
        **kwargs: Any,
    ) -> None:
        """Initialize a new LabelledArchiveDataModule instance.

        Args:
            table: Table of rasters written by ``geofm index``.
            sensors: Keys of the sensors of the images.
            labels: The labels, ``{path: labels.gpkg, column: class, all_touched: false}``, where
                *path* is a vector or raster file, a list of files, or a pattern such as
                ``masks/*.tif``; or a band of the table, such as ``landcover.class``.
            classes: Number of classes, their names, or their values by name, such as
                ``{water: 1, forest: {value: 2, color: '#266334'}}``. By default those of the file.
            target: Kind of target: 'segmentation', 'regression', 'multilabel' or 'majority'.
            ignore_index: Value of pixels without a label in class masks.
            class_weights: 'balanced' weights the classes in the loss of the task ('ce' or 'bce') by
                their inverse frequency in the training split.
            min_labelled: Minimum fraction of labelled pixels. Other samples are left out.
            **kwargs: Further arguments of
                :class:`~geofm.datamodules.masked_archive.TargetArchiveDataModule`, and of
                :class:`~geofm.datasets.archive.LabelledArchive`.

        Raises:
            BandError: If a band is unknown or given twice.
            LegendError: If the classes are invalid.
            SensorError: If a sensor is unknown.
            ValueError: If another argument is invalid.
        """
        if class_weights not in (None, 'balanced'):
            raise ValueError(f"class_weights must be 'balanced' or null, not {class_weights!r}")
        if class_weights is not None and target == 'regression':
            raise ValueError('class_weights do not apply to regression: leave them out')
        self._given = None if classes is None or target == 'regression' else Legend.of(classes)
        self.class_weights = class_weights
        self.ignore_index = ignore_index
        self.target: Target = target
        super().__init__(
            LabelledArchive,
            table,
            sensors,
            labels=labels,
            classes=classes,
            target=target,
            ignore_index=ignore_index,
            min_labelled=min_labelled,
            **kwargs,
        )

    @property
    def legend(self) -> Legend | None:
        """The classes; None for regression, or before they are known."""
        for split in ('train', 'val', 'test'):
            dataset = getattr(self, f'{split}_dataset', None)
            if isinstance(dataset, LabelledArchive):
                return dataset.legend
        return self._given

    def setup(self, stage: str) -> None:
        """Make the data sets of a stage, and configure the task for the labels.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.

        Raises:
            ValueError: If the task is for another target or has another *ignore_index*, or its loss
                does not support class weights.
        """
        super().setup(stage)
        if stage == 'fit':
            # TorchGeo drops the last incomplete batch, which may be the only one.
            size = self.batch_size or 1
            self.train_batch_size = min(size, len(self.train_dataset))  # type: ignore[arg-type]
            for split, dataset in (('train', self.train_dataset), ('val', self.val_dataset)):
                if isinstance(dataset, LabelledArchive):
                    rank_zero_info(f'{split}: {counted(len(dataset), "window")} with labels')
        task = self.trainer.lightning_module if self.trainer and self.trainer.model else None
        if task is None:
            return
        self._check_task(task)
        if self.target == 'regression':
            count_known_only(task)
        if self.class_weights is not None:
            self._weigh(task, stage)

    def _check_task(self, task: Any) -> None:
        """Check that a task of TorchGeo is for the target, and ignores pixels without a label."""
        # Slow to import, but a task has imported it already.
        from torchgeo.tasks import Classification, Regression, SemanticSegmentation

        of_pixels, name = self.target in ('segmentation', 'regression'), type(task).__name__
        others = (Classification,) if of_pixels else (SemanticSegmentation, Regression)
        if isinstance(task, others):
            raise ValueError(
                f"target '{self.target}' does not match the task {name}: change either"
            )
        ignored, classes = task.hparams.get('ignore_index'), task.hparams.get('num_classes')
        if self.target != 'segmentation' or ignored == self.ignore_index or not classes:
            return
        if ignored is not None or self.ignore_index < classes:
            raise ValueError(
                f'pixels without a label are {self.ignore_index} in the data, but the task has '
                f'ignore_index={ignored}: set both to the same value'
            )

    def _weigh(self, task: Any, stage: str) -> None:
        """Set the class weights of the loss of a task."""
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
                    f'{counted(len(found), "class", "classes")}, but the task has '
                    f'{counted(len(weights), "output")}: set '
                    f'{"num_labels" if multilabel else "num_classes"} to {len(found)}'
                )
            weights[: len(found)] = found
            told = zip(dataset.classes, found.tolist(), strict=True)
            rank_zero_info(
                'Class weights: ' + ', '.join(f'{name} {value:.3g}' for name, value in told)
            )
        # In other stages they are loaded from a checkpoint.
        weights = weights.to(task.device)
        name, argument = ('pos_weight',) * 2 if multilabel else ('weight', 'class_weights')
        setattr(criterion, name, weights)
        # So that the task can be loaded from its checkpoint.
        task.hparams[argument] = weights.cpu() if multilabel else weights.tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics in use and the classes, for a checkpoint.

        Returns:
            The state.
        """
        legend = self.legend
        state = super().state_dict()
        return state if legend is None else {**state, LEGEND_TAG: legend.entry()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Use the statistics of the run that wrote a checkpoint, and compare the classes.

        Args:
            state_dict: State returned by :meth:`state_dict`.

        Raises:
            ValueError: If the state is invalid.
        """
        super().load_state_dict(state_dict)
        legend = self.legend
        if LEGEND_TAG not in state_dict or legend is None:
            return
        other = Legend.from_entry(state_dict[LEGEND_TAG])
        if (other.values, other.names) != (legend.values, legend.names):
            warn(
                f'the checkpoint was trained with the classes {_listed(other)}, but the data have '
                f'{_listed(legend)}: the values have different meanings'
            )


def count_known_only(task: Any) -> None:
    """Make the loss and the metrics of a task ignore pixels whose target is NaN.

    Args:
        task: TorchGeo's PixelwiseRegression, or another task with 'criterion', 'train_metrics',
            'val_metrics' and 'test_metrics'. Calling this twice has no further effect.
    """
    for name in ('criterion', 'train_metrics', 'val_metrics', 'test_metrics'):
        module = getattr(task, name, None)
        if isinstance(module, nn.Module):
            module.register_forward_pre_hook(_known_only)


def _known_only(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    prediction, target = args
    known = ~target.isnan()
    return (prediction, target) if known.all() else (prediction[known], target[known])


def _listed(legend: Legend) -> str:
    return ', '.join(f'{c.value} {c.name}' for c in legend.classes)
