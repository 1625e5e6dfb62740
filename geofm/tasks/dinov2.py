"""DINOv2 task for self-supervised learning (SSL)."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightly.loss import KoLeoLoss
from lightly.utils.dist import gather, world_size
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchgeo.datasets.utils import Sample

from geofm.datamodules.sampling import run_seed
from geofm.losses import DINOLoss, EMACentering, GramLoss, IBOTLoss, SinkhornKnopp
from geofm.losses.precision import at_least_float32
from geofm.losses.ranks import reduced
from geofm.models import Source, read_task_weights
from geofm.models.packed_attention import choose_attention
from geofm.models.weights.carried import carry_statistics, read_input_statistics
from geofm.models.weights.files import METADATA
from geofm.tasks.nonfinite import AUTOCAST, Step, gradient_norms, write_dump
from geofm.tasks.parameters import check_precision, parameter_groups
from geofm.tasks.progress import KEY as PROGRESS
from geofm.tasks.progress import Course, Plan, Progress, read_progress
from geofm.tasks.randomness import batch_seed, seeded
from geofm.tasks.schedules import Schedules, dinov2_schedules
from geofm.tasks.student_teacher import StudentTeacher
from geofm.transforms import Crops
from geofm.transforms.photometry import PhotometryArgs
from geofm.transforms.statistics import statistics_of

#: Error of a run without a single step.
NO_STEPS = (
    'no step to train: the training data have fewer samples than a batch (lower batch_size), or '
    'max_epochs, max_steps or limit_train_batches is 0'
)


class DINOv2(StudentTeacher):
    """DINOv2: self-distillation of crops, masked patches and a spread of features.

    A student sees all crops of an image, its global ones with patches hidden; an EMA teacher sees
    the global crops whole. The loss is DINO on the CLS token, iBOT on the hidden patches, and
    KoLeo on the student's CLS features.

    :attr:`model` is the teacher's backbone: what one keeps, and what TorchGeo's
    ``extract_backbone`` finds in a checkpoint.

    If you use this code for your research, please cite the original papers:

    * https://arxiv.org/abs/2304.07193 (DINOv2)
    * https://arxiv.org/abs/2309.16588 (registers)
    * https://arxiv.org/abs/2508.10104 (DINOv3, if you use Gram anchoring)
    """

    ignore = ('weights', 'continue_from')

    #: Signal that this rank got, and the one that all ranks agreed to have got: 0 if none.
    stop_signal = 0
    agreed_signal = 0

    dino_center: EMACentering | SinkhornKnopp
    ibot_center: EMACentering | SinkhornKnopp

    def __init__(
        self,
        model: str = 'geofm_vit_small_patch16_linear',
        weights: str | dict[str, str | Source] | None = None,
        continue_from: str | None = None,
        in_channels: int = 15,
        bands: Sequence[str] | None = None,
        model_args: dict[str, Any] | None = None,
        drop_path_rate: float = 0.3,
        grad_checkpointing: bool = False,
        compile_blocks: bool = False,
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
            in_channels: Number of input channels.
            bands: Names of the input channels. Default: see
                :class:`geofm.models.MultiSensorViT`.
            model_args: Further arguments of the model.
            drop_path_rate: Stochastic depth of the student, the same in all blocks.
            grad_checkpointing: Whether to save memory and compute the blocks twice.
            compile_blocks: Whether to compile the blocks with ``torch.compile``.
            sensor_dropout: Probability that sensors are missing in a crop that the student sees,
                so that the backbone learns to do without them. Which ones is drawn at random from
                all subsets but none and all; of two sensors, it is one.
            one_sensor_masks: Share of the masked patches that are masked in one sensor only, drawn
                at random, to be predicted from the others.
            global_sensors: Sensors that student and teacher see of the global crops, each a key or
                a list of keys: the features of the teacher's sensors are learned from the
                student's. All by default.
            global_size: Side of the two global crops in pixels.
            local_size: Side of the local crops in pixels.
            n_local: Number of local crops.
            global_scale: Share of the image's area that a global crop covers.
            local_scale: Share of the image's area that a local crop covers.
            min_valid: Share of a crop that must be valid ground.
            photometry: Whether to change the crops' values, each sensor in its own way; or how
                much those of Sentinel-2: ``gain``, ``band_gain``, ``haze`` and ``probability``
                of :class:`geofm.transforms.photometry.ReflectanceGain`, and ``blur``, the range of
                the blur's standard deviation in pixels of a crop.
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
        self.weights = weights
        super().__init__()
        self.schedules: Schedules | None = None
        self._plan: Plan | None = None
        self._course: Course | None = None
        self._done: Progress | None = None
        self._resumed: dict[str, Any] | None = None
        self.seed = run_seed()
        self._step: Step | None = None
        if continue_from is not None:
            self.load_state_dict(read_task_weights(continue_from, self.state_dict()))
            self.model.statistics = read_input_statistics(continue_from)
        self._refresh_gram_teacher()

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

    # -- the method -----------------------------------------------------------------------------

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
        anchor = None if student.tokens is None else self.gram_forward(crops)

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

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of the losses.

        Args:
            losses: Losses by name, from :meth:`losses`.

        Returns:
            Scalar.
        """
        return torch.stack([self.loss_weights[name] * losses[name] for name in losses]).sum()

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
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        seed = batch_seed(self.seed, 'train', number, self.global_rank)
        self._step = Step(
            self.global_step, batch, seed, values['teacher_temperature'], self._centers()
        )
        with seeded(seed, self.device):
            losses, watched = self.losses(batch, values['teacher_temperature'], True)
        loss = self.total(losses)
        failed = (~torch.isfinite(loss)).float()
        # One collective for all flags. All ranks stop together: one that goes on would wait for the
        # others' gradients.
        flags = torch.stack([failed, failed.new_tensor(float(self.stop_signal))])
        any_failed, signalled = reduced(flags, dist.ReduceOp.MAX).tolist()
        self.agreed_signal = int(signalled)
        if any_failed:
            self._stop('loss' if failed else 'loss of another rank', losses)
        size = len(batch['image'])
        self.log('train_loss', loss, prog_bar=True, batch_size=size)
        self.log_dict({f'train_{k}': v for k, v in losses.items()}, batch_size=size)
        self.log_dict({f'schedule/{k}': v for k, v in values.items()}, batch_size=size)
        return {'loss': loss, **watched}

    def _centers(self) -> dict[str, Tensor]:
        """The centres as they are, by their names in a checkpoint."""
        return {
            f'{name}.{key}': value.clone()
            for name in ('dino_center', 'ibot_center')
            for key, value in getattr(self, name).state_dict().items()
        }

    def _stop(self, what: str, values: Mapping[str, Tensor]) -> None:
        """Stop a run whose numbers are not finite, keeping what it takes to see why.

        Raises:
            FloatingPointError: Always.
        """
        assert self._step is not None
        terms = {name: value.item() for name, value in values.items()}
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        path = write_dump(self, self._step, terms, folder)
        # The first rank to fail has the others ended.
        self.trainer.strategy.barrier()
        files = getattr(getattr(self.trainer, 'datamodule', None), 'files', None)
        of = f' Files of the batch: {files(self._step.batch)}.' if files is not None else ''
        raise FloatingPointError(
            f'{what} is not finite at step {self._step.number}: {terms}. The step is kept in '
            f'{path} (`geofm replay` does it again).{of} Look at these data, lower the learning '
            'rate or clip_grad, or resume from an earlier checkpoint'
        )

    def validation_step(self, batch: Sample, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compute the same losses on held-out images.

        Args:
            batch: The output of your DataLoader.
            batch_idx: Integer displaying index of this batch.
            dataloader_idx: Index of the current dataloader.
        """
        self._log_losses('val', batch, batch_idx)

    def test_step(self, batch: Sample, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compute the same losses on test images.

        Args:
            batch: The output of your DataLoader.
            batch_idx: Integer displaying index of this batch.
            dataloader_idx: Index of the current dataloader.
        """
        self._log_losses('test', batch, batch_idx)

    def _log_losses(self, split: str, batch: Sample, batch_idx: int) -> None:
        temperature = self.hparams['teacher_temperature'][1]
        # The same crops in every epoch, so that losses can be compared.
        with seeded(batch_seed(self.seed, split, batch_idx, self.global_rank), self.device):
            losses, _ = self.losses(batch, temperature)
        size = len(batch['image'])
        self.log(f'{split}_loss', self.total(losses), batch_size=size, sync_dist=True)
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
        present = batch.get('present')
        present = None if present is None else self.model.of_all_sensors(present)
        return self.model(batch['image'], batch.get('dates'), present)

    # -- a run ----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Prepare the photometry and, for training, the teacher.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.

        Raises:
            BandError: If the data module lacks a band of the model.
            ValueError: If student and teacher have different parameters.
        """
        super().setup(stage)
        if stage == 'fit':
            self.prepare_teacher()
            self.schedules = self._resumed = None

    def on_fit_start(self) -> None:
        """Check the precision, take up the input's statistics, and say which attention runs.

        Raises:
            ValueError: If weights are in half precision.
        """
        check_precision(self)
        # Lightning warns of modules in evaluation mode: here, those of the teacher.
        warnings.filterwarnings('ignore', r'Found \d+ module\(s\) in eval mode')
        self.take_up_statistics()
        dtype = AUTOCAST.get(str(self.trainer.precision), torch.float32)
        method, reason = choose_attention(self.device, dtype)
        rank_zero_info(f'Attention of packed crops: {method} ({reason})')

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the run's seed, how far it has come, and the input's statistics."""
        checkpoint['seed'] = self.seed
        datamodule = getattr(self._trainer, 'datamodule', None)
        statistics = statistics_of(getattr(datamodule, 'aug', None)) or self.model.statistics
        checkpoint[METADATA] = carry_statistics(statistics)
        if self._plan is not None and self._course is not None:
            before, step = (0, 0) if self._done is None else (self._done.samples, self._done.step)
            checkpoint[PROGRESS] = {
                'samples': before + (self.global_step - step) * self._plan.samples_per_step,
                'planned': self._course.samples,
                'course': astuple(self._course),
                'batch': self._plan.batch,
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the seed and the schedules of the run that is resumed."""
        self.seed = checkpoint.get('seed', self.seed)
        if self._trainer is not None:
            keys = ('loops', 'global_step', PROGRESS)
            self._resumed = {key: checkpoint[key] for key in keys if key in checkpoint}
            self.schedules = None

    # -- optimisation ---------------------------------------------------------------------------

    def _schedules(self) -> Schedules:
        """The table of this run, made when first asked for: it needs the data's length."""
        if self.schedules is None:
            hparams = self.hparams
            # Lightning builds the loaders later; their length and batch size are needed now.
            self.trainer.fit_loop.setup_data()
            self._plan = plan = Plan.of(self.trainer)
            self._done = done = (
                None if self._resumed is None else read_progress(self._resumed, plan)
            )
            self._course = course = plan.course(done, self._steps_per_epoch(plan))
            if course.steps < 1:
                raise ValueError(NO_STEPS)
            samples, step = (0.0, 0) if done is None else (done.samples, done.step)
            steps = np.arange(float(max(1, plan.steps_left(done))))
            places = (samples + steps * plan.samples_per_step) / course.samples_per_step
            self.schedules = dinov2_schedules(
                course.steps,
                course.steps_per_epoch,
                lr=hparams['lr'] * self._lr_scale(),
                min_lr=hparams['min_lr'],
                warmup_epochs=hparams['warmup_epochs'],
                freeze_last_layer_epochs=hparams['freeze_last_layer_epochs'],
                weight_decay=hparams['weight_decay'],
                momentum=hparams['momentum'],
                teacher_temperature=hparams['teacher_temperature'],
                warmup_teacher_temperature_epochs=hparams['warmup_teacher_temperature_epochs'],
                # Rounding must not move a value from its step.
                places=places.round(6),
                first=step,
            )
        return self.schedules

    def _steps_per_epoch(self, plan: Plan) -> float:
        """Optimiser steps of what counts as an epoch in warm-ups."""
        given = self.hparams['samples_per_epoch']
        if given is not None:
            self._batch_size('samples_per_epoch')
            return float(given / plan.samples_per_step)
        if not math.isinf(plan.steps_per_epoch):
            return plan.steps_per_epoch
        names = ('warmup_epochs', 'freeze_last_layer_epochs', 'warmup_teacher_temperature_epochs')
        if counted := [f'{name}={self.hparams[name]:g}' for name in names if self.hparams[name]]:
            raise ValueError(
                f'the data have no length, so that {", ".join(counted)} cannot be counted: set '
                'samples_per_epoch to the number of samples that count as an epoch, or these to 0'
            )
        return 0.0

    def _batch_size(self, why: str, off: object = None) -> int:
        batch_size = getattr(self.trainer.train_dataloader, 'batch_size', None)
        if batch_size is None:
            raise ValueError(f'{why}: the data loader has no batch_size; set {why} to {off}')
        return int(batch_size)

    def _lr_scale(self) -> float:
        if not self.hparams['scale_lr']:
            return 1.0
        total = (
            self._batch_size('scale_lr', off=False)
            * self.trainer.world_size
            * self.trainer.accumulate_grad_batches
        )
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

        Raises:
            FloatingPointError: If a gradient is not finite, unless a scaler is there for that.
        """
        largest = gradient_clip_val or self.hparams['clip_grad']
        norms = gradient_norms(self.student)
        # In half precision, the gradient scaler leaves such a step out and scales down.
        if (
            self.trainer.precision != '16-mixed'
            and not torch.stack([*norms.values()]).isfinite().all()
        ):
            self._stop('gradient', norms)
        if largest:
            for name, module in self.student.items():
                nn.utils.clip_grads_with_norm_(module.parameters(), largest, norms[name])

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
        self.move_teacher(self._schedules().at(self.global_step)['momentum'])
        every = self.hparams['gram_refresh_steps']
        if every and (self.global_step + 1) % every == 0:
            self._refresh_gram_teacher()
