"""DINOv2 task for self-supervised learning (SSL)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightly.loss import KoLeoLoss
from lightly.models.modules import DINOv2ProjectionHead
from lightly.utils.dist import gather, world_size
from torch import Tensor, nn
from torchgeo.datasets.utils import Sample

from geofm.losses import DINOLoss, EMACentering, GramLoss, IBOTLoss, SinkhornKnopp
from geofm.losses.precision import at_least_float32
from geofm.models import Source
from geofm.tasks.student_teacher import StudentTeacher
from geofm.tasks.teacher import Teacher
from geofm.transforms import Crops
from geofm.transforms.photometry import PhotometryArgs


class DINOv2(StudentTeacher):
    """DINOv2: self-distillation of crops, masked patches and a spread of features.

    A student sees all crops of an image, its global ones with patches hidden; an EMA teacher sees
    the global crops whole. The loss is DINO on the CLS token, iBOT on the masked patches, and
    KoLeo on the student's CLS features.

    :attr:`model` is the teacher's backbone: what one keeps, and what TorchGeo's
    ``extract_backbone`` finds in a checkpoint.

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
        continue_from: str | None = None,
        teacher: Teacher | None = None,
        in_channels: int = 15,
        bands: Sequence[str] | None = None,
        model_args: dict[str, Any] | None = None,
        drop_path_rate: float = 0.3,
        grad_checkpointing: bool | Literal['attention', 'matmul'] = False,
        compile_blocks: bool = False,
        check_every_n_batches: int = 1,
        # Several sensors
        sensor_dropout: float = 0.0,
        one_sensor_masks: float = 0.0,
        global_sensors: tuple[str | list[str], str | list[str]] | None = None,
        # Crops and masks
        global_size: int = 224,
        local_size: int = 96,
        n_local: int = 8,
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.32),
        min_valid: float = 0.5,
        photometry: bool | PhotometryArgs = True,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
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
        gram_weight: float = 0.0,
        gram_size: int | None = None,
        gram_refresh_steps: int | None = None,
        # Optimisation
        lr: float = 4e-3,
        scale_lr: bool = True,
        min_lr: float = 1e-6,
        samples_per_epoch: int | None = None,
        warmup_epochs: float = 10,
        freeze_last_layer_epochs: float = 1,
        weight_decay: tuple[float, float] = (0.04, 0.4),
        momentum: tuple[float, float] = (0.992, 1.0),
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        warmup_teacher_temperature_epochs: float = 30,
        layer_decay: float = 0.9,
        patch_embed_lr_mult: float = 0.2,
        betas: tuple[float, float] = (0.9, 0.999),
        clip_grad: float | None = 3.0,
    ) -> None:
        """Initialize the DINOv2 task.

        Args:
            model: Name of a geofm model, for ``timm.create_model``.
            weights: What to start from: a checkpoint of this project; or a ViT of another's, for a
                model with one sensor, or by the key of the sensor, see
                :func:`geofm.models.load_backbone_weights`.
            continue_from: Checkpoint of this task whose student, teacher, heads and centres to go
                on with, on a schedule of its own: for a phase at a higher resolution.
            teacher: A frozen, pretrained model whose features are learned beside DINOv2's losses.
            in_channels: Number of input channels.
            bands: Names of the input channels. Default: see
                :class:`geofm.models.MultiSensorViT`.
            model_args: Further arguments of the model.
            drop_path_rate: Stochastic depth of the student, the same in all blocks.
            grad_checkpointing: Whether to save memory and compute the blocks twice; 'attention' or
                'matmul': all of them but attention, or but attention and linear layers.
            compile_blocks: Whether to compile blocks and heads with ``torch.compile``.
            check_every_n_batches: Batches from one look at whether losses and gradients are finite,
                and whether a signal came, to the next. A GPU idles while the host looks.
                Between two looks, steps that are not finite, and all that follow, change nothing;
                the batches since the last look stay on the device.
            sensor_dropout: Probability that sensors are missing in a crop that the student sees,
                so that the backbone learns to do without them. Which ones is drawn at random from
                all subsets but none and all; of two sensors, it is one.
            one_sensor_masks: Fraction of the masked patches that are masked in one sensor only,
                drawn at random, to be predicted from the others.
            global_sensors: Sensors that student and teacher see of the global crops, each a key or
                a list of keys: the features of the teacher's sensors are learned from the
                student's. All by default.
            global_size: Side of the two global crops in pixels.
            local_size: Side of the local crops in pixels.
            n_local: Number of local crops.
            global_scale: Fraction of the image's area that a global crop covers.
            local_scale: Fraction of the image's area that a local crop covers.
            min_valid: Fraction of a crop that must be valid ground.
            photometry: Whether to change the crops' values, each sensor in its own way; or how
                much those of Sentinel-2: ``gain``, ``band_gain``, ``haze`` and ``probability``
                of :class:`geofm.transforms.photometry.ReflectanceGain`, and ``blur``, the range of
                the blur's standard deviation in pixels of a crop.
            mask_probability: Fraction of the global crops in which patches are masked.
            mask_ratio: Least and largest fraction of masked patches in such a crop.
            prototypes: Number of prototypes of the DINO head.
            head_hidden_dim: Width of the heads' hidden layers.
            head_bottleneck_dim: Width of the heads' bottleneck.
            separate_ibot_head: Whether iBOT has a head of its own.
            ibot_prototypes: Number of prototypes of that head; as many as DINO's by default.
            ibot_bottleneck_dim: Width of that head's bottleneck; as wide as DINO's by default.
            centering: How the teacher is kept from collapse.
            student_temperature: Temperature of the student's softmax.
            dino_weight: Weight of the DINO loss.
            ibot_weight: Weight of the iBOT loss.
            koleo_weight: Weight of the KoLeo loss, summed over the global crops.
            koleo_gather: Whether KoLeo looks for the nearest neighbour of a feature among the
                crops of all ranks, so that the loss does not depend on their number. By default
                among those of its own rank, as in DINOv2's code.
            gram_weight: Weight of Gram anchoring, to an earlier teacher; DINOv3 takes 2.
            gram_size: Side of the global crops that this teacher sees, in pixels, if larger;
                DINOv3 takes twice *global_size*.
            gram_refresh_steps: Optimiser steps after which it is replaced by the present teacher;
                by default it stays what the run starts with.
            lr: Peak learning rate, of a batch of 1024 if it is scaled.
            scale_lr: Whether to multiply *lr* by sqrt(batch / 1024), over all ranks.
            min_lr: Final learning rate.
            samples_per_epoch: Samples, over all ranks, that count as an epoch in what follows. By
                default one pass over the data. Streams of data, whose length is not known, need it;
                so may runs of few passes over much data.
            warmup_epochs: Warm-up of the learning rate.
            freeze_last_layer_epochs: How long the heads' last layers stay as they are.
            weight_decay: First and final weight decay.
            momentum: First and final momentum of the teacher.
            teacher_temperature: First and final temperature of the teacher.
            warmup_teacher_temperature_epochs: How long the temperature rises.
            layer_decay: Factor of the learning rate from a block to the one below.
            patch_embed_lr_mult: Factor of the patch embedding's learning rate.
            betas: AdamW's coefficients.
            clip_grad: Largest gradient norm of each sub-network (backbone, heads); the Trainer's
                ``gradient_clip_val``, where given, takes its place.

        Raises:
            TypeError: If *model* is not a geofm model.
            ValueError: If what needs several sensors is asked of a model with one.
            CheckpointError: If a checkpoint cannot be read or does not fit.
        """
        # The other arguments reach the base as hyperparameters: Lightning collects those of each
        # __init__, and those of the class itself go before those of its bases.
        super().__init__(weights=weights, continue_from=continue_from, teacher=teacher)

    def build_heads(self) -> dict[str, nn.Module]:
        """The DINO head and, if it is apart, the iBOT head.

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
        """CLS and patch logits; one head for both runs once.

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
        """What is scheduled: also the last layers' learning rate and the teacher's temperature.

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
        """Initialize losses, and what turns the teacher's logits into targets."""
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
        """Losses of a batch; centres learn from it in training.

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
        """Losses of a batch.

        Args:
            batch: Normalised ``image`` of shape (B, C, H, W), or (B, k, C, H, W) with k dates of
                each, and where known ``valid``, ``dates`` and ``present``.
            temperature: Teacher temperature.
            update_centers: Whether the centres learn from this batch.

        Returns:
            The losses by name, and for those who watch, of this rank: mean entropy of the
            teacher's CLS targets in nats, their mean of shape (K,), and CLS features of shape
            (2B, D).
        """
        crops: Crops = self.multi_crop(batch)
        with torch.no_grad():
            teacher = self.teacher_forward(crops)
        student = self.student_forward(crops)
        anchor = None if self.gram_backbone is None else self.gram_forward(crops)

        # Half precision is too coarse for what follows.
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
        """KoLeo of each global crop on its own, summed."""
        views = [at_least_float32(view) for view in features.chunk(2)]
        if self.hparams['koleo_gather'] and world_size() > 1:
            # The gradient is summed over the ranks, and DDP then takes their mean.
            views = [torch.cat(gather(view)) for view in views]
        if len(views[0]) < 2:
            # An image alone has no neighbour to keep away from.
            return at_least_float32(features.new_zeros(()))
        return torch.stack([self.koleo_loss(view) for view in views]).sum()

    def changing_state(self) -> dict[str, Tensor]:
        """The centres as they are.

        Returns:
            Copies, by their names in a checkpoint.
        """
        return super().changing_state() | {
            f'{name}.{key}': value.clone()
            for name in ('dino_center', 'ibot_center')
            for key, value in getattr(self, name).state_dict().items()
        }
