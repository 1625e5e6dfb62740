"""DINOv2 task for self-supervised learning (SSL)."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightly.loss import KoLeoLoss
from lightly.models.modules import DINOv2ProjectionHead
from lightly.utils.dist import gather, world_size
from torch import Tensor, nn
from torchgeo.datasets.utils import Sample

from geofm.losses import DINOLoss, EMACentering, GramLoss, IBOTLoss, SinkhornKnopp, at_least_float32
from geofm.models import Source
from geofm.tasks.student_teacher import StudentTeacher
from geofm.transforms import Crops


class DINOv2(StudentTeacher):
    """DINOv2: self-distillation on crops and masked patches, with a loss that spreads features.

    A student sees all crops of an image, with masked patches in the global crops. An EMA teacher
    sees the global crops without masks. The losses are DINO on the CLS token, iBOT on the masked
    patches, and KoLeo on the student's CLS features.

    :attr:`model` is the teacher's backbone. It is the one to keep after training, and the one that
    TorchGeo's ``extract_backbone`` finds in a checkpoint.

    If you use this code for your research, please cite the original papers:

    * https://arxiv.org/abs/2304.07193 (DINOv2)
    * https://arxiv.org/abs/2309.16588 (registers)
    * https://arxiv.org/abs/2508.10104 (DINOv3, if you use Gram anchoring)
    """

    distills = True
    optional_weights = (*StudentTeacher.optional_weights, 'dino_center.', 'ibot_center.')

    dino_center: EMACentering | SinkhornKnopp
    ibot_center: EMACentering | SinkhornKnopp

    def __init__(
        self,
        model: str = 'geofm_vit_small_patch16_linear',
        weights: str | dict[str, str | Source] | None = None,
        # Heads and losses
        prototypes: int = 65536,
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        separate_ibot_head: bool = False,
        ibot_prototypes: int | None = None,
        ibot_bottleneck_dim: int | None = None,
        centering: Literal['ema', 'sinkhorn_knopp'] = 'ema',
        student_temperature: float = 0.1,
        dino_weight: float = 1.0,
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
        koleo_gather: bool = False,
        # Schedules
        freeze_last_layer_epochs: float = 1,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        warmup_teacher_temperature_epochs: float = 30,
        **kwargs: Any,
    ) -> None:
        """Initialize the DINOv2 task.

        Args:
            model: Name of a geofm model, for ``timm.create_model``.
            weights: Weights to start from: a checkpoint of geofm, or pretrained weights of another
                ViT, for a model with one sensor or by sensor key; see
                :func:`geofm.models.load_backbone_weights`.
            prototypes: Number of prototypes of the DINO head.
            head_hidden_dim: Width of the heads' hidden layers.
            head_bottleneck_dim: Width of the heads' bottleneck.
            separate_ibot_head: Whether iBOT has its own head.
            ibot_prototypes: Number of prototypes of the iBOT head. Default: *prototypes*.
            ibot_bottleneck_dim: Width of the iBOT head's bottleneck. Default:
                *head_bottleneck_dim*.
            centering: How collapse is avoided: a moving average ('ema') or Sinkhorn-Knopp.
            student_temperature: Temperature of the student's softmax.
            dino_weight: Weight of the DINO loss.
            ibot_weight: Weight of the iBOT loss.
            koleo_weight: Weight of the KoLeo loss, summed over the global crops.
            koleo_gather: Whether KoLeo searches nearest neighbours among the crops of all ranks, so
                that the loss does not depend on the number of ranks. Default: among the crops of
                the own rank, as in DINOv2's code.
            freeze_last_layer_epochs: Epochs in which the last layers of the heads are frozen.
            teacher_temperature: Initial and final temperature of the teacher.
            warmup_teacher_temperature_epochs: Epochs in which the temperature rises.
            **kwargs: Further arguments of :class:`~geofm.tasks.StudentTeacher` and
                :class:`~geofm.tasks.PretrainingTask`: the frozen teacher, the model,
                crops and masks, sensors, the EMA teacher, Gram anchoring and optimisation.

        Raises:
            TypeError: If *model* is not a geofm model.
            ValueError: If an argument needs several sensors and the model has one.
            CheckpointError: If a checkpoint or the teacher cannot be read or does not fit.
            BandError: If bands are unknown or lack those of the teacher.
        """
        # The arguments of this class reach its bases as hyperparameters. Lightning collects those
        # of each __init__.
        super().__init__(model=model, weights=weights, **kwargs)

    def build_heads(self) -> dict[str, nn.Module]:
        """Build the DINO head and, if *separate_ibot_head* is set, the iBOT head.

        Returns:
            The heads by name.
        """
        hparams = self.hparams

        def head(prototypes: int, bottleneck_dim: int) -> nn.Module:
            return DINOv2ProjectionHead(
                self.model.embed_dim, hparams['head_hidden_dim'], bottleneck_dim, prototypes
            )

        prototypes, bottleneck_dim = hparams['prototypes'], hparams['head_bottleneck_dim']
        heads = {'dino_head': head(prototypes, bottleneck_dim)}
        if hparams['separate_ibot_head']:
            heads['ibot_head'] = head(
                hparams['ibot_prototypes'] or prototypes,
                hparams['ibot_bottleneck_dim'] or bottleneck_dim,
            )
        return heads

    def apply_heads(
        self, heads: nn.ModuleDict, cls: Tensor, patches: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute CLS and patch logits. A shared head runs once for both.

        Args:
            heads: Heads of student or teacher.
            cls: CLS tokens of shape (N, D).
            patches: Tokens of the M masked patches, of shape (M, D).

        Returns:
            Logits of shapes (N, K) and (M, K').
        """
        if 'ibot_head' in heads:
            return heads['dino_head'](cls), heads['ibot_head'](patches)
        cls_logits, patch_logits = heads['dino_head'](torch.cat([cls, patches])).split(
            [len(cls), len(patches)]
        )
        return cls_logits, patch_logits

    def schedule_settings(self) -> dict[str, Any]:
        """Return the settings of the schedules.

        They include the last layers' learning rate and the teacher's temperature.

        Returns:
            Arguments of :func:`geofm.tasks.schedules.dinov2_schedules`.
        """
        names = (
            'freeze_last_layer_epochs',
            'teacher_temperature',
            'warmup_teacher_temperature_epochs',
        )
        return {**super().schedule_settings(), **{name: self.hparams[name] for name in names}}

    def configure_losses(self) -> None:
        """Initialize the losses and the centering of the teacher's logits."""
        hparams = self.hparams
        centering = EMACentering if hparams['centering'] == 'ema' else SinkhornKnopp
        ibot_prototypes = hparams['prototypes']
        if hparams['separate_ibot_head']:
            ibot_prototypes = hparams['ibot_prototypes'] or ibot_prototypes
        self.dino_center = centering(hparams['prototypes'])
        self.ibot_center = centering(ibot_prototypes)
        self.dino_loss = DINOLoss(hparams['student_temperature'])
        self.ibot_loss = IBOTLoss(hparams['student_temperature'])
        self.koleo_loss = KoLeoLoss()
        self.gram_loss = GramLoss()
        terms = ('dino', 'ibot', 'koleo', 'gram')
        self.loss_weights = {name: hparams[f'{name}_weight'] for name in terms}

    def compute_losses(
        self, batch: Sample, values: Mapping[str, float] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the losses of a batch. In training this also updates the centres.

        Args:
            batch: See :meth:`losses`.
            values: Values of the schedules; None outside of training.

        Returns:
            See :meth:`losses`.
        """
        if values is None:
            return self.losses(batch, self.hparams['teacher_temperature'][1])
        return self.losses(batch, values['teacher_temperature'], update_centers=True)

    def losses(
        self, batch: Sample, temperature: float, update_centers: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the losses of a batch.

        Args:
            batch: Normalised ``image`` of shape (B, C, H, W), or (B, k, C, H, W) with k dates, and
                optionally ``valid``, ``dates`` and ``present``.
            temperature: Teacher temperature.
            update_centers: Whether to update the centres with this batch.

        Returns:
            The losses by name, and diagnostics of this rank: mean entropy of the teacher's CLS
            targets in nats, the mean target of shape (K,), and CLS features of shape (2B, D).
        """
        crops: Crops = self.multi_crop(batch)
        with torch.no_grad():
            teacher = self.teacher_forward(crops)
        student = self.student_forward(crops)
        anchor = None if self.gram_backbone is None else self.gram_forward(crops)

        # The losses need full precision.
        with torch.autocast(self.device.type, enabled=False):
            with torch.no_grad():
                cls_targets = self.dino_center(teacher.cls, temperature)
                patch_targets = self.ibot_center(teacher.patches, temperature)
                if update_centers:
                    self.dino_center.update(teacher.cls)
                    self.ibot_center.update(teacher.patches)
            images = len(crops.globals) // 2
            losses = {
                'dino': self.dino_loss(
                    student.cls.unflatten(0, (-1, images)), cls_targets.unflatten(0, (2, images))
                ),
                'ibot': self.ibot_loss(student.patches, patch_targets, crops.masks, crops.masked),
                'koleo': self._koleo(student.features),
            }
            if student.tokens is not None and anchor is not None:
                losses['gram'] = self.gram_loss(student.tokens, anchor)
        losses |= self.distill(crops, student.features, student.tokens, learn=update_centers)
        watched = {
            'target_entropy': torch.special.entr(cls_targets).sum(dim=-1).mean(),
            'mean_target': cls_targets.mean(dim=0),
            'features': teacher.features,
        }
        return losses, watched

    def _koleo(self, features: Tensor) -> Tensor:
        """Compute the sum of the KoLeo losses of the two global crops."""
        views = [at_least_float32(view) for view in features.chunk(2)]
        if self.hparams['koleo_gather'] and world_size() > 1:
            # The backward pass sums the gradient over the ranks; DDP then averages it.
            views = [torch.cat(gather(view)) for view in views]
        if len(views[0]) < 2:
            # A single image has no neighbour.
            return at_least_float32(features.new_zeros(()))
        return torch.stack([self.koleo_loss(view) for view in views]).sum()

    def changing_state(self) -> dict[str, Tensor]:
        """Return the state that :meth:`compute_losses` changes: centres and a teacher's averages.

        Returns:
            Copies by their names in a checkpoint.
        """
        return super().changing_state() | {
            f'{name}.{key}': value.clone()
            for name in ('dino_center', 'ibot_center')
            for key, value in getattr(self, name).state_dict().items()
        }
