"""k-NN accuracy of a backbone while it is being pretrained."""

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torchgeo.datamodules import BaseDataModule

from geofm.evaluation import encoder_of, extract_features, knn_accuracy
from geofm.evaluation.features import side_by_side


class OnlineKNN(Callback):
    """Measure the features by k-NN on labelled data after every few epochs.

    Features of the training split are the bank, those of the validation split are labelled by
    their neighbours. Accuracies are logged as ``knn/top1_k{k}``, of the CLS token or the pooled
    features. Of a ViT there are also those of the mean and of the standard deviation of its
    patches, and of CLS and mean side by side: ``knn_mean_of_patches/top1_k{k}``,
    ``knn_std_of_patches/top1_k{k}``, ``knn_cls_and_mean_of_patches/top1_k{k}``.

    Of :class:`geofm.tasks.DINOv2` that is the teacher's backbone. TorchGeo's ``SimCLR``, ``MoCo``
    and ``MAE`` can be watched too, and ``Classification`` of a ViT.

    Under several ranks each one computes it all, which keeps them in step.
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
        """Set the labelled data up once, before training."""
        if stage == 'fit':
            backbone_of(pl_module)
            self.datamodule.prepare_data()
            self.datamodule.setup('fit')

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, if it is time."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs and epoch != trainer.max_epochs:
            return
        self._measure(pl_module)

    def _measure(self, pl_module: LightningModule) -> None:
        backbone = backbone_of(pl_module)
        encoder = encoder_of(backbone)
        training = {module: module.training for module in backbone.modules()}
        backbone.eval()
        bank, queries = (
            extract_features(encoder.pooled, loader, self.datamodule.aug, pl_module.device)
            for loader in (self.datamodule.train_dataloader(), self.datamodule.val_dataloader())
        )
        for module, mode in training.items():
            module.training = mode
        for name, vectors in encoder.features.items():
            shown = name == next(iter(encoder.features))
            # 'CLS token' is 'knn', 'mean of patches' is 'knn_mean_of_patches'.
            group = 'knn' if shown else f'knn_{name.replace(" ", "_").lower()}'
            for k in self.k:
                accuracy = knn_accuracy(
                    side_by_side(bank.features, vectors),
                    bank.labels,
                    side_by_side(queries.features, vectors),
                    queries.labels,
                    k=min(k, len(bank.labels)),
                )
                pl_module.log(f'{group}/top1_k{k}', accuracy, prog_bar=shown and k == self.k[0])


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
