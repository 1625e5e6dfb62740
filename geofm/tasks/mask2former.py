"""Semantic segmentation with Mask2Former."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchgeo.datasets import DependencyNotFoundError
from torchgeo.datasets.utils import Sample
from torchgeo.tasks import SemanticSegmentation
from torchgeo.tasks.utils import extract_backbone

import geofm.models  # noqa: F401  registers the encoders

#: Hyperparameters of SemanticSegmentation with fixed values in Mask2Former.
_SEMANTIC: dict[str, Any] = {
    'task': 'multiclass',
    'num_labels': None,
    'loss': 'ce',
    'class_weights': None,
}


class Mask2Former(SemanticSegmentation):
    """Task for semantic segmentation with the Mask2Former of Hugging Face Transformers.

    Each of a set of queries predicts class probabilities and a mask. The score of a class at a
    pixel is the sum of class probability times mask over all queries. The backbone is an encoder of
    segmentation-models-pytorch, e.g. a geofm model with its feature pyramid.

    Training minimises Mask2Former's loss, which matches queries to the classes of an image. The
    output of :meth:`forward`, and with it validation, test, prediction and plots, has the format of
    TorchGeo's ``SemanticSegmentation``. ``val_loss`` is the cross-entropy per pixel.

    Needs the extra ``geofm[mask2former]``.

    If you use this code for your research, please cite the original paper:

    * https://arxiv.org/abs/2112.01527
    """

    def __init__(
        self,
        backbone: str = 'geofm_vit_small_patch16_linear',
        weights: str | None = None,
        in_channels: int = 15,
        num_classes: int = 2,
        labels: list[str] | None = None,
        ignore_index: int | None = None,
        num_queries: int = 100,
        model_args: dict[str, Any] | None = None,
        lr: float = 1e-4,
        patience: int = 10,
        freeze_backbone: bool = False,
    ) -> None:
        """Initialize the Mask2Former task.

        Args:
            backbone: Name of an encoder of segmentation-models-pytorch, which include
                :data:`geofm.models.MODEL_NAMES`.
            weights: Checkpoint with weights of the backbone, as for TorchGeo's tasks: of
                :class:`geofm.tasks.DINOv2`, or an export of it.
            in_channels: Number of input channels.
            num_classes: Number of classes.
            labels: Names of the classes.
            ignore_index: Label of pixels that metrics and ``val_loss`` ignore. In training they
                belong to no class, as in the original.
            num_queries: Number of queries.
            model_args: Further arguments of transformers' ``Mask2FormerConfig``.
            lr: Learning rate.
            patience: Patience of the learning rate scheduler.
            freeze_backbone: Whether to freeze the backbone.

        Raises:
            DependencyNotFoundError: If transformers is not installed.
            CheckpointError: If the weights do not fit.
        """
        self.weights = weights
        # Skip SemanticSegmentation's __init__, whose arguments are for other models.
        super(SemanticSegmentation, self).__init__()

    def configure_models(self) -> None:
        """Build the model and load the backbone's weights."""
        try:
            from geofm.models.auto_backbone import build_mask2former
        except ImportError as error:
            raise DependencyNotFoundError(
                "Mask2Former needs transformers. Install it with: pip install 'geofm[mask2former]'"
            ) from error
        # Metrics and steps of SemanticSegmentation read these.
        self.hparams.update(_SEMANTIC)
        self.model, encoder = build_mask2former(
            self.hparams['backbone'],
            self.hparams['in_channels'],
            num_labels=self.hparams['num_classes'],
            num_queries=self.hparams['num_queries'],
            **(self.hparams['model_args'] or {}),
        )
        if self.weights is not None:
            encoder.load_state_dict(extract_backbone(str(self.weights))[1])
        if self.hparams['freeze_backbone']:
            for parameter in encoder.parameters():
                parameter.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        """Segment images.

        Args:
            x: Normalised images of shape (B, C, H, W).

        Returns:
            Log-probabilities of the classes, of shape (B, num_classes, H, W).
        """
        return _log_probabilities(self.model(x), x)

    def training_step(self, batch: Sample, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Compute the loss of the matched queries.

        Args:
            batch: 'image' of shape (B, C, H, W) and 'mask', int64 of shape (B, H, W).
            batch_idx: Index of the batch.
            dataloader_idx: Index of the data loader.

        Returns:
            The loss.

        Raises:
            ValueError: If a label is neither a class nor *ignore_index*.
        """
        x, y = batch['image'], batch['mask']
        classes = [self._classes(mask) for mask in y]
        masks = [(mask == one[:, None, None]).float() for mask, one in zip(y, classes, strict=True)]
        output = self.model(x, mask_labels=masks, class_labels=classes)
        with torch.no_grad():
            self.train_metrics(_log_probabilities(output, x), y)
        loss: Tensor = output.loss.squeeze()
        self.log('train_loss', loss, batch_size=len(x))
        return loss

    def _classes(self, mask: Tensor) -> Tensor:
        """Return the classes in a mask, in ascending order."""
        classes, ignored = mask.unique(), self.hparams['ignore_index']
        if ignored is not None:
            classes = classes[classes != ignored]
        wrong = classes[(classes < 0) | (classes >= self.hparams['num_classes'])]
        if len(wrong):
            raise ValueError(
                f'a mask has labels {wrong.tolist()}, which are neither classes 0 to '
                f'{self.hparams["num_classes"] - 1} nor ignore_index ({ignored})'
            )
        return classes.long()


def _log_probabilities(output: Any, x: Tensor) -> Tensor:
    """Compute log-probabilities from the sum of class probability times mask over the queries."""
    classes = output.class_queries_logits.softmax(dim=-1)[..., :-1]
    masks = output.masks_queries_logits.sigmoid()
    scores = torch.einsum('bqc,bqhw->bchw', classes, masks)
    scores = F.interpolate(scores, x.shape[-2:], mode='bilinear').clamp_min(1e-8)
    return (scores / scores.sum(dim=1, keepdim=True)).log()
