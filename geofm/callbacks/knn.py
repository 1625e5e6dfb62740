"""k-NN accuracy of the teacher while it is being pretrained."""

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from torchgeo.datamodules import BaseDataModule

from geofm.evaluation import backbone_encoder, extract_features, knn_accuracy
from geofm.models import MultiSensorViT


class OnlineKNN(Callback):
    """Measure the features by k-NN on labelled data after every few epochs.

    Features of the training split are the bank, those of the validation split are labelled by
    their neighbours. Accuracies are logged as ``knn/top1_k{k}``.

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
            self.datamodule.prepare_data()
            self.datamodule.setup('fit')

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, if it is time."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs and epoch != trainer.max_epochs:
            return
        self._measure(pl_module)

    def _measure(self, pl_module: LightningModule) -> None:
        backbone = pl_module.model
        assert isinstance(backbone, MultiSensorViT)
        encoder = backbone_encoder(backbone)
        bank, queries = (
            extract_features(encoder, loader, self.datamodule.aug, pl_module.device)
            for loader in (self.datamodule.train_dataloader(), self.datamodule.val_dataloader())
        )
        for k in self.k:
            accuracy = knn_accuracy(*bank, *queries, k=min(k, len(bank.labels)))
            pl_module.log(f'knn/top1_k{k}', accuracy, prog_bar=k == self.k[0])
