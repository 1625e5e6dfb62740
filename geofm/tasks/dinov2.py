"""DINOv2 task for self-supervised learning (SSL)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from lightly.loss import KoLeoLoss
from lightly.models.modules import DINOv2ProjectionHead
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchgeo.datasets.utils import Sample
from torchgeo.tasks import BaseTask

from geofm.losses import DINOLoss, EMACentering, IBOTLoss, SinkhornKnopp
from geofm.models import MultiSensorViT, Source, create_backbone, load_backbone_weights
from geofm.tasks.parameters import parameter_groups
from geofm.tasks.schedules import Schedules, dinov2_schedules
from geofm.transforms import Crops, MultiCrop


class DINOv2(BaseTask):
    """DINOv2: self-distillation of crops, masked patches and a spread of features.

    A student sees all crops of an image, its global ones with patches hidden; an EMA teacher sees
    the global crops whole. The loss is DINO on the CLS token, iBOT on the hidden patches, and
    KoLeo on the student's CLS features.

    :attr:`model` is the teacher's backbone: what one keeps, and what TorchGeo's
    ``extract_backbone`` finds in a checkpoint.

    If you use this code for your research, please cite the original papers:

    * https://arxiv.org/abs/2304.07193 (DINOv2)
    * https://arxiv.org/abs/2309.16588 (registers)
    """

    ignore = ('weights',)

    model: MultiSensorViT
    student: nn.ModuleDict
    teacher_heads: nn.ModuleDict

    def __init__(
        self,
        model: str = 'geofm_vit_small_patch16_linear',
        weights: str | dict[str, str | Source] | None = None,
        in_channels: int = 15,
        bands: Sequence[str] | None = None,
        model_args: dict[str, Any] | None = None,
        drop_path_rate: float = 0.3,
        sensor_dropout: float = 0.0,
        # Crops and masks
        global_size: int = 224,
        local_size: int = 96,
        n_local: int = 8,
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.32),
        min_valid: float = 0.5,
        photometry: bool = True,
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
        # Optimisation
        lr: float = 4e-3,
        scale_lr: bool = True,
        min_lr: float = 1e-6,
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
            in_channels: Number of input channels.
            bands: Names of the input channels. Default: see
                :class:`geofm.models.MultiSensorViT`.
            model_args: Further arguments of the model.
            drop_path_rate: Stochastic depth of the student.
            sensor_dropout: Probability that one of two sensors is hidden from the student in a
                crop, so that the backbone learns to do without.
            global_size: Side of the two global crops in pixels.
            local_size: Side of the local crops in pixels.
            n_local: Number of local crops.
            global_scale: Share of the image's area that a global crop covers.
            local_scale: Share of the image's area that a local crop covers.
            min_valid: Share of a crop that must be valid ground.
            photometry: Whether to change the crops' values, each sensor in its own way.
            mask_probability: Share of the global crops in which patches are hidden.
            mask_ratio: Least and largest share of hidden patches in such a crop.
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
            lr: Peak learning rate, of a batch of 1024 if it is scaled.
            scale_lr: Whether to multiply *lr* by sqrt(batch / 1024), over all ranks.
            min_lr: Final learning rate.
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
            ValueError: If sensors are to be dropped from a model with one sensor.
        """
        self.weights = weights
        super().__init__()
        self.schedules: Schedules | None = None

    def configure_models(self) -> None:
        """Initialize student, teacher and the cropping of their input."""
        hparams = self.hparams
        self.model = create_backbone(hparams)
        if self.weights:
            load_backbone_weights(self.model, self.weights)
        backbone = create_backbone(hparams, drop_path_rate=hparams['drop_path_rate'])
        backbone.load_state_dict(self.model.state_dict())

        # TorchGeo takes every key that contains 'model.' for the backbone's: none here may.
        self.student = nn.ModuleDict({'backbone': backbone, **self._heads()})
        self.teacher_heads = self._heads()
        for name, head in self.teacher_heads.items():
            head.load_state_dict(self.student[name].state_dict())
        self.model.requires_grad_(False)
        self.teacher_heads.requires_grad_(False)
        if hparams['sensor_dropout']:
            if len(backbone.sensors) < 2:
                raise ValueError('sensor_dropout needs a model with two sensors')
        elif backbone.fusion is not None:
            # Never used, so never given a gradient, which distributed training would wait for.
            backbone.stand_in.requires_grad_(False)

        self.multi_crop = MultiCrop(
            bands=self.model.bands,
            global_size=hparams['global_size'],
            local_size=hparams['local_size'],
            n_local=hparams['n_local'],
            global_scale=hparams['global_scale'],
            local_scale=hparams['local_scale'],
            patch_size=self.model.patch_size,
            mask_probability=hparams['mask_probability'],
            mask_ratio=hparams['mask_ratio'],
            min_valid=hparams['min_valid'],
            photometry=hparams['photometry'],
        )

    def _heads(self) -> nn.ModuleDict:
        hparams = self.hparams

        def head(prototypes: int, bottleneck_dim: int) -> nn.Module:
            return DINOv2ProjectionHead(
                self.model.embed_dim, hparams['head_hidden_dim'], bottleneck_dim, prototypes
            )

        prototypes, bottleneck_dim = hparams['prototypes'], hparams['head_bottleneck_dim']
        heads = nn.ModuleDict({'dino_head': head(prototypes, bottleneck_dim)})
        if hparams['separate_ibot_head']:
            heads['ibot_head'] = head(
                hparams['ibot_prototypes'] or prototypes,
                hparams['ibot_bottleneck_dim'] or bottleneck_dim,
            )
        return heads

    def configure_losses(self) -> None:
        """Initialize losses, and what turns the teacher's logits into targets."""
        hparams = self.hparams
        centering = {'ema': EMACentering, 'sinkhorn_knopp': SinkhornKnopp}[hparams['centering']]
        ibot_prototypes = hparams['prototypes']
        if hparams['separate_ibot_head']:
            ibot_prototypes = hparams['ibot_prototypes'] or ibot_prototypes
        self.dino_center = centering(hparams['prototypes'])
        self.ibot_center = centering(ibot_prototypes)
        self.dino_loss = DINOLoss(hparams['student_temperature'])
        self.ibot_loss = IBOTLoss(hparams['student_temperature'])
        self.koleo_loss = KoLeoLoss()
        self.loss_weights = {
            'dino': hparams['dino_weight'],
            'ibot': hparams['ibot_weight'],
            'koleo': hparams['koleo_weight'],
        }

    def train(self, mode: bool = True) -> 'DINOv2':
        """Set the training mode of the student; the teacher always evaluates."""
        super().train(mode)
        self.model.eval()
        self.teacher_heads.eval()
        return self

    # -- the method -----------------------------------------------------------------------------

    def teacher_forward(self, crops: Crops) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher on the global crops.

        Args:
            crops: Crops of a batch of B images.

        Returns:
            CLS logits of shape (2B, K), logits of the masked patches of shape (M, K'), and the
            CLS features of shape (2B, D).
        """
        tokens = self.model.forward_features(crops.globals, crops.global_dates)
        cls, patches = tokens[:, 0], tokens[:, self.model.num_prefix_tokens :][crops.masks]
        return *_apply_heads(self.teacher_heads, cls, patches), cls

    def student_forward(self, crops: Crops) -> tuple[Tensor, Tensor, Tensor]:
        """Student on all crops, with patches of the global ones hidden.

        Args:
            crops: Crops of a batch of B images, n of them local.

        Returns:
            CLS logits of shape ((2 + n) B, K), logits of the masked patches of shape (M, K'), and
            the CLS features of the global crops, of shape (2B, D).
        """
        backbone = cast(MultiSensorViT, self.student['backbone'])

        def tokens_of(views: Tensor, dates: Tensor | None, masks: Tensor | None) -> Tensor:
            return backbone.forward_features(views, dates, masks, self._present(len(views)))

        tokens = tokens_of(crops.globals, crops.global_dates, crops.masks)
        cls, patches = tokens[:, 0], tokens[:, backbone.num_prefix_tokens :][crops.masks]
        every_cls = [cls]
        if len(crops.locals):
            every_cls.append(tokens_of(crops.locals, crops.local_dates, None)[:, 0])
        return *_apply_heads(self.student, torch.cat(every_cls), patches), cls

    def _present(self, crops: int) -> Tensor | None:
        """Which sensors the student sees in each crop: both, or now and then one."""
        rate = self.hparams['sensor_dropout']
        if not rate:
            return None
        hidden = torch.rand(crops, device=self.device) < rate
        which = torch.rand(crops, device=self.device) < 0.5
        return ~torch.stack([hidden & which, hidden & ~which], dim=1)

    def losses(
        self, batch: Sample, temperature: float, update_center: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of a batch.

        Args:
            batch: Normalised ``image`` of shape (B, C, H, W), or (B, k, C, H, W) with k dates of
                each, and where known ``valid`` and ``dates``.
            temperature: Teacher temperature.
            update_center: Whether the centres learn from this batch.

        Returns:
            The three losses by name, and for those who watch: mean entropy of the teacher's CLS
            targets in nats, entropy of their mean, and CLS features of shape (2B, D).
        """
        crops: Crops = self.multi_crop(batch)
        with torch.no_grad():
            teacher_cls, teacher_patches, features = self.teacher_forward(crops)
            cls_targets = self.dino_center(teacher_cls, temperature, update_center)
            patch_targets = self.ibot_center(teacher_patches, temperature, update_center)
        cls, patches, backbone_cls = self.student_forward(crops)

        images = len(crops.globals) // 2
        with torch.autocast(self.device.type, enabled=False):
            koleo = [self.koleo_loss(view.float()) for view in backbone_cls.chunk(2)]
        losses = {
            'dino': self.dino_loss(
                cls.unflatten(0, (-1, images)), cls_targets.unflatten(0, (2, images))
            ),
            'ibot': self.ibot_loss(patches, patch_targets, crops.masks),
            # An image alone has no neighbour to keep away from.
            'koleo': torch.stack(koleo).sum() if images > 1 else cls.new_zeros(()),
        }
        watched = {
            'target_entropy': _entropy(cls_targets).mean(),
            'mean_target_entropy': _entropy(cls_targets.mean(dim=0)),
            'features': features,
        }
        return losses, watched

    def training_step(
        self, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Compute the training loss.

        Args:
            batch: The output of your DataLoader.
            batch_idx: Integer displaying index of this batch.
            dataloader_idx: Index of the current dataloader.

        Returns:
            ``loss``, and what :meth:`losses` gives for those who watch.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        values = self._schedules().at(self.global_step)
        losses, watched = self.losses(batch, values['teacher_temperature'], update_center=True)
        loss = torch.stack([self.loss_weights[name] * losses[name] for name in losses]).sum()
        if not torch.isfinite(loss):
            terms = {name: value.item() for name, value in losses.items()}
            raise FloatingPointError(
                f'loss is not finite at step {self.global_step}: {terms}. Lower the learning rate '
                'or clip_grad, or resume from an earlier checkpoint'
            )
        size = len(batch['image'])
        self.log('train_loss', loss, prog_bar=True, batch_size=size)
        self.log_dict({f'train_{k}': v for k, v in losses.items()}, batch_size=size)
        self.log_dict({f'schedule/{k}': v for k, v in values.items()}, batch_size=size)
        return {'loss': loss, **watched}

    def validation_step(self, batch: Sample, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compute the same losses on held-out images.

        Args:
            batch: The output of your DataLoader.
            batch_idx: Integer displaying index of this batch.
            dataloader_idx: Index of the current dataloader.
        """
        self._log_losses('val', batch)

    def test_step(self, batch: Sample, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compute the same losses on test images.

        Args:
            batch: The output of your DataLoader.
            batch_idx: Integer displaying index of this batch.
            dataloader_idx: Index of the current dataloader.
        """
        self._log_losses('test', batch)

    def _log_losses(self, split: str, batch: Sample) -> None:
        temperature = self.hparams['teacher_temperature'][1]
        losses, _ = self.losses(batch, temperature, update_center=False)
        size = len(batch['image'])
        loss = torch.stack([self.loss_weights[name] * losses[name] for name in losses]).sum()
        self.log(f'{split}_loss', loss, batch_size=size, sync_dist=True)
        self.log_dict(
            {f'{split}_{k}': v for k, v in losses.items()}, batch_size=size, sync_dist=True
        )

    def predict_step(self, batch: Sample, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Embed images with the teacher.

        Args:
            batch: The output of your DataLoader.
            batch_idx: Integer displaying index of this batch.
            dataloader_idx: Index of the current dataloader.

        Returns:
            CLS features of shape (B, D).
        """
        return self.model(batch['image'], batch.get('dates'))

    # -- optimisation ---------------------------------------------------------------------------

    def _schedules(self) -> Schedules:
        """The table of this run, made when first asked for: it needs the data's length."""
        if self.schedules is None:
            trainer, hparams = self.trainer, self.hparams
            # Lightning builds the loaders later; their length and batch size are needed now.
            trainer.fit_loop.setup_data()
            steps = trainer.estimated_stepping_batches
            if steps == float('inf'):
                raise ValueError('schedules need an end: set max_epochs or max_steps')
            batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
            per_epoch = (
                max(1, int(batches) // accumulated) if batches != float('inf') else int(steps)
            )
            self.schedules = dinov2_schedules(
                int(steps),
                per_epoch,
                lr=hparams['lr'] * self._lr_scale(),
                min_lr=hparams['min_lr'],
                warmup_epochs=hparams['warmup_epochs'],
                freeze_last_layer_epochs=hparams['freeze_last_layer_epochs'],
                weight_decay=hparams['weight_decay'],
                momentum=hparams['momentum'],
                teacher_temperature=hparams['teacher_temperature'],
                warmup_teacher_temperature_epochs=hparams['warmup_teacher_temperature_epochs'],
            )
        return self.schedules

    def _lr_scale(self) -> float:
        if not self.hparams['scale_lr']:
            return 1.0
        batch_size = getattr(self.trainer.train_dataloader, 'batch_size', None)
        if batch_size is None:
            raise ValueError('scale_lr: the data loader has no batch_size; set scale_lr=False')
        total = batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        return float((total / 1024) ** 0.5)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Initialize AdamW with DINOv2's parameter groups.

        Returns:
            The optimizer; learning rate and weight decay are set step by step.
        """
        hparams = self.hparams
        groups = parameter_groups(
            self.student, self.model.depth, hparams['layer_decay'], hparams['patch_embed_lr_mult']
        )
        # The fused kernel unscales gradients itself, and clipping must come after that.
        fused = self.trainer.precision != '16-mixed'
        lr = float(self._schedules().lr.max())
        return AdamW(groups, lr=lr, betas=hparams['betas'], fused=fused)

    def on_train_batch_start(self, batch: Sample, batch_idx: int) -> None:
        """Set learning rates and weight decay of this step."""
        values = self._schedules().at(self.global_step)
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        for group in optimizer.param_groups:
            lr = values['last_layer_lr'] if group['last_layer'] else values['lr']
            group['lr'] = lr * group['lr_mult']
            group['weight_decay'] = values['weight_decay'] * group['wd_mult']

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient norm of each sub-network on its own.

        Args:
            optimizer: The optimizer.
            gradient_clip_val: Largest norm; that of the task if None.
            gradient_clip_algorithm: Accepted for Lightning: DINOv2 clips by norm.
        """
        largest = gradient_clip_val or self.hparams['clip_grad']
        if largest:
            for module in self.student.values():
                nn.utils.clip_grad_norm_(module.parameters(), largest)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step the student, then move the teacher towards it.

        Here, and not at the end of the batch, where a callback may save a checkpoint first.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        momentum = self._schedules().at(self.global_step)['momentum']
        teacher: list[Tensor] = [*self.model.parameters(), *self.teacher_heads.parameters()]
        student: list[Tensor] = [*self.student['backbone'].parameters()]
        for name in self.teacher_heads:
            student += self.student[name].parameters()
        with torch.no_grad():
            torch._foreach_lerp_(teacher, student, 1 - momentum)


def _apply_heads(heads: nn.ModuleDict, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """CLS and patch logits; one head for both runs once."""
    if 'ibot_head' in heads:
        return heads['dino_head'](cls), heads['ibot_head'](patches)
    cls_logits, patch_logits = heads['dino_head'](torch.cat([cls, patches])).split(
        [len(cls), len(patches)]
    )
    return cls_logits, patch_logits


def _entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats along the last dimension."""
    return torch.special.entr(probabilities).sum(dim=-1)
