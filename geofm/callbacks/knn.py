"""k-NN accuracy of a backbone while it is being pretrained."""

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

from geofm.datamodules import NamedBandsDataModule
from geofm.datamodules.sampling import run_seed
from geofm.evaluation import (
    LabelledFeatures,
    encoder_of,
    extract_features,
    knn_accuracy,
    knn_average_precision,
)
from geofm.evaluation.backbones import Encoder
from geofm.evaluation.features import side_by_side
from geofm.models import MultiSensorViT
from geofm.sensors import BandError


class OnlineKNN(Callback):
    """Measure the features by k-NN on labelled data after every few epochs.

    Features of the training split are the bank, those of the validation split are labelled by
    their neighbours. Accuracies are logged as ``knn/top1_k{k}``, of the CLS token or the pooled
    features. Of a ViT there are also those of the mean and of the standard deviation of its
    patches, and of CLS and mean side by side: ``knn_mean_of_patches/top1_k{k}``,
    ``knn_std_of_patches/top1_k{k}``, ``knn_cls_and_mean_of_patches/top1_k{k}``.

    Where an image has several labels there is no accuracy: logged is the average precision of the
    votes, ``knn/map_k{k}`` and so on, see :func:`geofm.evaluation.knn_average_precision`.

    The bands of the labelled data are those of the backbone, matched by name if the data come from
    a :class:`geofm.datamodules.NamedBandsDataModule`.

    Of :class:`geofm.tasks.DINOv2` that is the teacher's backbone. TorchGeo's ``SimCLR``, ``MoCo``
    and ``MAE`` can be watched too, and ``Classification`` of a ViT.

    Several ranks share out the batches among them. The features of all are then compared on each
    rank, which keeps the ranks in step.
    """

    def __init__(
        self, datamodule: BaseDataModule, every_n_epochs: int = 1, k: Sequence[int] = (5, 20)
    ) -> None:
        """Initialize a new OnlineKNN instance.

        Args:
            datamodule: Labelled data, e.g. any classification data module of TorchGeo.
            every_n_epochs: Epochs from one measurement to the next; the last epoch has one.
            k: Numbers of neighbours.
        """
        self.datamodule = datamodule
        self.every_n_epochs = every_n_epochs
        self.k = tuple(k)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the labelled data up once, before training.

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
        """Look at one batch of each split, so that data that do not fit are told at once.

        Raises:
            BandError: If the images have other channels than the backbone.
            ValueError: If they have no labels, or labels that cannot be ones.
        """
        self._features(pl_module, batches=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, if it is time."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs and epoch != trainer.max_epochs:
            return
        self._measure(pl_module)

    def _measure(self, pl_module: LightningModule) -> None:
        encoder, bank, queries = self._features(pl_module)
        several = bank.labels.ndim == 2
        if not several and len(bank.labels.unique()) < 2:
            raise ValueError(
                f'OnlineKNN: all labels are {bank.labels[0].item()}: with one class there is '
                'nothing to tell apart'
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
        """Features of the first batches, or all, of the training and of the validation split."""
        backbone = backbone_of(pl_module)
        encoder = encoder_of(backbone)
        training = {module: module.training for module in backbone.modules()}
        backbone.eval()
        try:
            # Loaders draw a seed each, which training must not notice.
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
    """Features of the first batches of a loader, or all, which the ranks share out among them."""
    ranks = world_size()
    share, surplus = loader, 0
    # A few batches are looked at on every rank, so that each refuses data that do not fit. A stream
    # cannot be shared out.
    stream = isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None
    if ranks > 1 and batches is None and not stream:
        share, surplus = batches_of_rank(loader, task.global_rank, ranks)
    features = extract_features(encoder.pooled, islice(share, batches), prepare, task.device)
    if share is loader:
        return features
    own = (part[: len(part) - surplus].to(task.device) for part in features)
    return LabelledFeatures(*(torch.cat(gather_all_tensors(part)).cpu() for part in own))


def batches_of_rank(loader: DataLoader[Any], rank: int, ranks: int) -> tuple[DataLoader[Any], int]:
    """A loader of every n-th batch of another.

    Every rank gets as many batches, since a sharded backbone only runs on all ranks together.

    Args:
        loader: Loader of a map-style data set, in batches.
        rank: Number of the first batch.
        ranks: From one batch to the next.

    Returns:
        The loader, and the number of its last samples that are those of the first batch again, to
        be left out. Where *loader* shuffles, it is by the run's seed, alike on all ranks.
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
    """The backbone that a task pretrains.

    Args:
        task: :class:`geofm.tasks.DINOv2`, or a task of TorchGeo.

    Returns:
        The model, without its head if it is not a ViT.

    Raises:
        TypeError: If the task has no backbone that is known here.
    """
    for name in ('model', 'backbone'):
        found = getattr(task, name, None)
        # MAE's backbone is a wrapper around one.
        found = getattr(found, 'vit', found)
        if hasattr(found, 'forward_features'):
            assert isinstance(found, nn.Module)
            return found
    raise TypeError(
        f'{type(task).__name__} has no backbone of geofm or timm under model or backbone'
    )
