"""k-NN accuracy of a backbone during pretraining."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from lightly.utils.dist import world_size
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchgeo.datamodules import BaseDataModule
from torchmetrics.utilities.distributed import gather_all_tensors

from geofm.datamodules import NamedBandsDataModule, run_seed
from geofm.evaluation import (
    LabelledFeatures,
    encoder_of,
    extract_features,
    knn_accuracy,
    knn_average_precision,
    side_by_side,
)
from geofm.evaluation.backbones import Encoder
from geofm.models import MultiSensorViT
from geofm.sensors import BandError


class OnlineKNN(Callback):
    """Callback that classifies labelled data by k-NN on the backbone's features.

    Images of the validation split are labelled by their nearest neighbours in the training split.
    The accuracy with the CLS token, or with pooled features if there is none, is logged as
    ``knn/top1_k{k}``. For a ViT, further accuracies are logged for the mean of its patches
    (``knn_mean_of_patches/top1_k{k}``), their standard deviation
    (``knn_std_of_patches/top1_k{k}``), and the concatenation of CLS and mean
    (``knn_cls_and_mean_of_patches/top1_k{k}``).

    For multi-label data, the average precision of the votes is logged instead, as
    ``knn/map_k{k}``, see :func:`geofm.evaluation.knn_average_precision`.

    The labelled data must have the bands of the backbone. Data of a
    :class:`geofm.datamodules.NamedBandsDataModule` are matched by band name.

    With :class:`geofm.tasks.DINOv2` the backbone is the teacher's. TorchGeo's ``SimCLR``, ``MoCo``,
    ``MAE``, and ``Classification`` with a ViT are supported too.

    With several ranks, each rank computes the features of a part of the batches. All ranks then
    compare the gathered features.
    """

    def __init__(
        self, datamodule: BaseDataModule, every_n_epochs: int = 1, k: Sequence[int] = (5, 20)
    ) -> None:
        """Initialize a new OnlineKNN instance.

        Args:
            datamodule: Labelled data, e.g. any classification data module of TorchGeo.
            every_n_epochs: Number of epochs between measurements. The last epoch is always
                measured.
            k: Numbers of neighbours; a value is logged for each.
        """
        self.datamodule = datamodule
        self.every_n_epochs = every_n_epochs
        self.k = tuple(k)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set up the labelled data before training.

        Raises:
            BandError: If the labelled data do not have the bands of the backbone.
            TypeError: If the task has no backbone.
        """
        if stage != 'fit':
            return
        backbone = backbone_of(pl_module)
        bands = backbone.bands if isinstance(backbone, MultiSensorViT) else None
        if bands is not None and isinstance(self.datamodule, NamedBandsDataModule):
            self.datamodule.match_bands(bands)
        self.datamodule.prepare_data()
        self.datamodule.setup('fit')
        given = getattr(self.datamodule.aug, 'bands', None)
        if bands is not None and given is not None and tuple(given) != bands:
            raise BandError(
                f'OnlineKNN: the labelled data have the bands {list(given)}, but the backbone has '
                f'{list(bands)}'
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check one batch of each split, so that unsuitable data raise an error early.

        Raises:
            BandError: If the images and the backbone have different channels.
            ValueError: If the images have no labels or invalid labels.
        """
        self._features(pl_module, batches=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if the epoch is due."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs and epoch != trainer.max_epochs:
            return
        self._measure(pl_module)

    def _measure(self, pl_module: LightningModule) -> None:
        encoder, bank, queries = self._features(pl_module)
        several = bank.labels.ndim == 2
        if not several and len(bank.labels.unique()) < 2:
            raise ValueError(
                f'OnlineKNN: all labels are {bank.labels[0].item()}: give labelled data with at '
                'least two classes'
            )
        measure, metric = (knn_average_precision, 'map') if several else (knn_accuracy, 'top1')
        for name, vectors in encoder.features.items():
            shown = name == next(iter(encoder.features))
            # 'CLS token' is 'knn', 'mean of patches' is 'knn_mean_of_patches'.
            group = 'knn' if shown else f'knn_{name.replace(" ", "_").lower()}'
            for k in self.k:
                value = measure(
                    side_by_side(bank.features, vectors),
                    bank.labels,
                    side_by_side(queries.features, vectors),
                    queries.labels,
                    k=min(k, len(bank.labels)),
                )
                pl_module.log(f'{group}/{metric}_k{k}', value, prog_bar=shown and k == self.k[0])

    def _features(
        self, pl_module: LightningModule, batches: int | None = None
    ) -> tuple[Encoder, LabelledFeatures, LabelledFeatures]:
        """Compute features of the training and validation split, of *batches* batches or all."""
        backbone = backbone_of(pl_module)
        encoder = encoder_of(backbone)
        training = {module: module.training for module in backbone.modules()}
        backbone.eval()
        try:
            # Each loader draws a seed; fork, so that the random numbers of training stay the same.
            with torch.random.fork_rng(devices=[]):
                bank, queries = (
                    _shared_features(loader, encoder, self.datamodule.aug, pl_module, batches)
                    for loader in (
                        self.datamodule.train_dataloader(),
                        self.datamodule.val_dataloader(),
                    )
                )
        finally:
            for module, mode in training.items():
                module.training = mode
        return encoder, bank, queries


def _shared_features(
    loader: Any,
    encoder: Encoder,
    prepare: Callable[[dict[str, Any]], Mapping[str, Any]],
    task: LightningModule,
    batches: int | None,
) -> LabelledFeatures:
    """Compute features of the first batches of a loader, or of all, divided among the ranks."""
    ranks = world_size()
    share, surplus = loader, 0
    # A few batches are computed on every rank, so that each raises an error for unsuitable data. A
    # stream cannot be divided among ranks.
    stream = isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None
    if ranks > 1 and batches is None and not stream:
        share, surplus = batches_of_rank(loader, task.global_rank, ranks)
    features = extract_features(encoder.pooled, islice(share, batches), prepare, task.device)
    if share is loader:
        return features
    own = (part[: len(part) - surplus].to(task.device) for part in features)
    return LabelledFeatures(*(torch.cat(gather_all_tensors(part)).cpu() for part in own))


def batches_of_rank(loader: DataLoader[Any], rank: int, ranks: int) -> tuple[DataLoader[Any], int]:
    """Create a loader with every *ranks*-th batch of another loader.

    Every rank gets the same number of batches, because a sharded backbone must run on all ranks
    together. A rank with too few batches repeats the first batch of *loader*. A loader that
    shuffles does so by the run's seed, in the same order on all ranks.

    Args:
        loader: Loader of a map-style data set, in batches.
        rank: Index of this rank, which is the index of its first batch.
        ranks: Number of ranks.

    Returns:
        The loader, and the number of samples at its end that are repeated and must be dropped.
    """
    torch.manual_seed(run_seed())
    assert loader.batch_sampler is not None
    order = list(loader.batch_sampler)
    share, surplus = order[rank::ranks], []
    if len(share) < len(order[::ranks]):
        surplus = order[0]
        share.append(surplus)
    again = DataLoader(
        loader.dataset,
        batch_sampler=share,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
    return again, len(surplus)


def backbone_of(task: LightningModule) -> nn.Module:
    """Return the backbone of a task.

    Args:
        task: :class:`geofm.tasks.DINOv2`, or a task of TorchGeo.

    Returns:
        The backbone.

    Raises:
        TypeError: If the task has no supported backbone.
    """
    for name in ('model', 'backbone'):
        found = getattr(task, name, None)
        # MAE wraps its backbone.
        found = getattr(found, 'vit', found)
        if hasattr(found, 'forward_features'):
            assert isinstance(found, nn.Module)
            return found
    raise TypeError(
        f"{type(task).__name__} has no backbone of geofm or timm as 'model' or 'backbone'"
    )
