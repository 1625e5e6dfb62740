"""Base class of all self-supervised pretraining tasks. A method is a subclass of it."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchgeo.datasets.utils import Sample
from torchgeo.tasks import BaseTask

from geofm.datamodules import run_seed
from geofm.device import to_device
from geofm.models import (
    MultiSensorViT,
    Source,
    View,
    choose_attention,
    create_backbone,
    load_backbone_weights,
    read_task_weights,
    shapes_only,
)
from geofm.models.checkpoints import METADATA, carry_statistics, read_model
from geofm.sensors import BandError, band_indices, bands_of, sensor_channels
from geofm.tasks.dumps import Step, write_dump
from geofm.tasks.finite import FiniteGuard, SeenBatch
from geofm.tasks.parameters import AUTOCAST, check_precision, gradient_norms, parameter_groups
from geofm.tasks.progress import KEY as PROGRESS
from geofm.tasks.progress import Course, Plan, Progress, read_progress
from geofm.tasks.randomness import batch_seed, seeded
from geofm.tasks.schedules import Schedules, dinov2_schedules
from geofm.tasks.teacher import FeatureDistillation, Teacher
from geofm.transforms import Crops, MultiCrop, Normalize, PhotometryArgs, statistics_of

#: Error message of a run without any step.
NO_STEPS = (
    'no step to train: the training data have fewer samples than a batch (lower batch_size), or '
    'max_epochs, max_steps or limit_train_batches is 0'
)

_ON_META = ContextVar('on_meta', default=False)


@contextmanager
def networks_on_meta() -> Iterator[None]:
    """Context in which tasks build their networks on the meta device, without memory.

    The strategy ``fsdp2`` later fills the shards with weights. Unlike Lightning's
    ``trainer.init_module(empty_init=True)`` it affects pretraining tasks only.

    Yields:
        Nothing.
    """
    token = _ON_META.set(True)
    try:
        yield
    finally:
        _ON_META.reset(token)


class PretrainingTask(BaseTask):
    """Base class of tasks that pretrain a backbone on multi-crops.

    It builds the backbone and the crops from hyperparameters and implements everything except the
    losses: schedules by the number of samples, AdamW with layer-wise learning rates, clipping,
    resuming, stopping, checkpoints, logs and predictions. ``geofm export``, the map commands,
    ``OnlineKNN`` and ``CollapseWatch`` work with every subclass, and ``geofm replay`` with those in
    :mod:`geofm.tasks`; for others, import the class and call :func:`geofm.tasks.replay`.

    A method is a subclass that defines

    * ``__init__``, if it has hyperparameters of its own, passing the others on:
      ``def __init__(self, sharpness: float = 1.0, **kwargs: Any): super().__init__(**kwargs)``.
      Read hyperparameters from ``self.hparams``, where Lightning collects those of all classes.
      ``geofm fit`` can set the arguments of all signatures. To change a default, repeat the
      argument in the signature; a value passed on by ``super().__init__`` has no effect on
      ``self.hparams``;
    * :meth:`build_heads`: the modules that are trained with the backbone;
    * :meth:`configure_losses`: sets :attr:`loss_weights`, the factor of each loss by name;
    * :meth:`compute_losses`: the losses of a batch. It makes crops with ``self.multi_crop(batch)``
      and computes their features with
      ``self.trained['backbone'].forward_views(self.views(crops))``.

    A method that adds :meth:`distill` to its losses and sets :attr:`distills` can also learn from a
    frozen ``teacher``.

    This class trains :attr:`model` itself. For methods with an EMA teacher, subclass
    :class:`geofm.tasks.StudentTeacher`.

    Attributes:
        model: The backbone to keep after training.
        heads: Modules that are trained with the backbone.
        distillation: The frozen teacher and the heads that predict its features; None without a
            teacher.
        multi_crop: Transform that makes the crops of a batch.
        loss_weights: Factor of each loss by name.
    """

    #: Arguments that are not stored in checkpoints, because they name files.
    ignore: Sequence[str] = ('weights', 'continue_from', 'teacher')

    #: Prefixes of weights that a checkpoint to continue from may lack.
    optional_weights: tuple[str, ...] = ('distillation.',)

    #: Whether the losses include those of a frozen teacher.
    distills = False

    #: Signal that this rank received, and the largest one over all ranks; 0 for none.
    stop_signal = 0
    agreed_signal = 0

    model: MultiSensorViT
    heads: nn.ModuleDict
    distillation: FeatureDistillation | None
    multi_crop: MultiCrop
    loss_weights: Mapping[str, float]

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
        # Optimisation
        lr: float = 4e-3,
        scale_lr: bool = True,
        min_lr: float = 1e-6,
        samples_per_epoch: int | None = None,
        warmup_epochs: float = 10,
        weight_decay: tuple[float, float] = (0.04, 0.4),
        layer_decay: float = 0.9,
        patch_embed_lr_mult: float = 0.2,
        betas: tuple[float, float] = (0.9, 0.999),
        clip_grad: float | None = 3.0,
    ) -> None:
        """Initialize the task.

        Args:
            model: Name of a geofm model, for ``timm.create_model``.
            weights: Weights to start from: a checkpoint of geofm, or pretrained weights of another
                ViT, for a model with one sensor or by sensor key; see
                :func:`geofm.models.load_backbone_weights`.
            continue_from: Checkpoint of this task. Training starts from its backbone and heads,
                with a new schedule, for example for a phase at a higher resolution.
            teacher: Frozen, pretrained model whose features are learned in addition to the losses
                of the method.
            in_channels: Number of input channels.
            bands: Names of the input channels. Default: see
                :class:`geofm.models.MultiSensorViT`.
            model_args: Further arguments of the model.
            drop_path_rate: Rate of stochastic depth in the trained backbone, equal for all blocks.
            grad_checkpointing: Whether to recompute the blocks in the backward pass to save memory.
                'attention' keeps the results of attention, 'matmul' those of attention and linear
                layers.
            compile_blocks: Whether to compile blocks and heads with ``torch.compile``.
            check_every_n_batches: Number of batches between checks for losses and gradients that
                are not finite, and for signals. A GPU idles during a check. Between checks, a step
                that is not finite and all steps after it change nothing, and the batches since the
                last check are kept on the device.
            sensor_dropout: Probability that sensors are dropped from a crop of the trained
                backbone, so that it learns to work without them. The dropped sensors are a random
                subset, neither empty nor all; of two sensors, one is dropped.
            one_sensor_masks: Fraction of the masked patches that are masked in one random sensor
                only, so that they are predicted from the others.
            global_size: Side of the two global crops in pixels.
            local_size: Side of the local crops in pixels.
            n_local: Number of local crops.
            global_scale: Range of the area of a global crop, as a fraction of the image.
            local_scale: Range of the area of a local crop, as a fraction of the image.
            min_valid: Fraction of a crop that must have valid data.
            photometry: Whether to augment the values of the crops, with the rules of each sensor;
                or the strengths for sensors that measure reflectance: ``gain``, ``band_gain``,
                ``haze`` and ``probability`` of :class:`geofm.transforms.Photometry`, and ``blur``,
                the range of the blur's standard deviation in pixels of a crop.
            mask_probability: Fraction of the global crops in which patches are masked.
            mask_ratio: Lowest and highest fraction of masked patches in such a crop.
            lr: Peak learning rate; for a batch of 1024 if *scale_lr* is set.
            scale_lr: Whether to multiply *lr* by sqrt(batch / 1024), with the batch over all ranks.
            min_lr: Final learning rate.
            samples_per_epoch: Number of samples over all ranks that count as an epoch in the
                arguments below. Default: the length of the data. Required for streams of unknown
                length; useful for runs with few passes over many data.
            warmup_epochs: Epochs of linear warm-up of the learning rate.
            weight_decay: Initial and final weight decay.
            layer_decay: Factor of the learning rate per block, from the last to the first.
            patch_embed_lr_mult: Factor of the learning rate of patch embeddings.
            betas: Coefficients of AdamW.
            clip_grad: Largest gradient norm of each sub-network (backbone, heads). The Trainer's
                ``gradient_clip_val`` overrides it.

        Raises:
            TypeError: If *model* is not a geofm model.
            ValueError: If an argument needs several sensors and the model has one.
            CheckpointError: If a checkpoint or the teacher cannot be read or does not fit.
            BandError: If bands are unknown or lack those of the teacher.
        """
        self.weights, self.continue_from, self.teacher = weights, continue_from, teacher
        self._empty = _ON_META.get() or torch.get_default_device().type == 'meta'
        self._rng_state = torch.get_rng_state()
        with torch.device('cpu') if self._empty else nullcontext():
            super().__init__()
        self.schedules: Schedules | None = None
        self._plan: Plan | None = None
        self._course: Course | None = None
        self._done: Progress | None = None
        self._resumed: dict[str, Any] | None = None
        self.seed = run_seed()
        self._guard = FiniteGuard()
        self._state_before: dict[str, Tensor] = {}
        self._shown_loss: float | None = None
        for key in (state := self.state_dict()):
            if 'model.' in key and not key.startswith('model.'):
                raise ValueError(f"{key}: TorchGeo takes any key with 'model.' for the backbone's")
        if continue_from is not None and not self._empty:
            file = read_model(continue_from)
            self.load_state_dict(read_task_weights(file, state, self.optional_weights))
            self.model.statistics = file.statistics

    # -- methods to implement -------------------------------------------------------------------

    @abstractmethod
    def compute_losses(
        self, batch: Sample, values: Mapping[str, float] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the losses of a batch.

        Args:
            batch: Normalised ``image`` of shape (B, C, H, W), or (B, k, C, H, W) with k dates, and
                optionally ``valid``, ``dates`` and ``present``.
            values: Values of the schedules at this training step, by name; None outside of
                training.

        Returns:
            A pair of dictionaries. First, the losses: scalars under the names in
            :attr:`loss_weights`. Second, diagnostics of this rank, without gradients: ``features``,
            CLS features of shape (N, D) of :attr:`model`, and for methods with soft targets over K
            prototypes ``target_entropy``, their mean entropy in nats, and ``mean_target`` of shape
            (K,).
        """

    def build_heads(self) -> dict[str, nn.Module]:
        """Build the modules that are trained with the backbone.

        Returns:
            New modules by name. No name of a module or submodule may end with ``model``.
        """
        return {}

    def schedule_settings(self) -> dict[str, Any]:
        """Return the settings of the schedules, except those given by the length of the run.

        Returns:
            Arguments of :func:`geofm.tasks.schedules.dinov2_schedules`.
        """
        names = ('lr', 'min_lr', 'warmup_epochs', 'weight_decay')
        return {name: self.hparams[name] for name in names}

    def changing_state(self) -> dict[str, Tensor]:
        """Return the state that :meth:`compute_losses` changes in training, e.g. centres.

        Returns:
            Copies of the buffers by their names in a checkpoint. Here these are the averages of a
            frozen teacher's features.
        """
        if self.distillation is None:
            return {}
        buffers = self.distillation.state_dict(prefix='distillation.').items()
        return {name: value.clone() for name, value in buffers if '.criteria.' in name}

    @property
    def trained(self) -> nn.ModuleDict:
        """Modules to optimise: ``backbone`` and heads, whose gradients are clipped separately."""
        return self.with_distillation({'backbone': self.model, **self.heads})

    # -- networks and crops ---------------------------------------------------------------------

    def configure_models(self) -> None:
        """Initialize the networks and the multi-crop transform."""
        with self.device_of_networks():
            self.model = self.build_backbone(drop_path_rate=self.hparams['drop_path_rate'])
            self.heads = nn.ModuleDict(self.build_heads())
        self.compile_heads(self.heads)
        self.prepare_trained(self.model)
        self.distillation = self.build_distillation()
        self.multi_crop = self.build_multi_crop()

    def device_of_networks(self) -> AbstractContextManager[Any]:
        """Return the context in which networks are built.

        Returns:
            The meta device if the task is built on it; otherwise the default device.
        """
        return shapes_only() if self._empty else nullcontext()

    def configure_model(self) -> None:
        """Shard backbones and heads over the ranks, if the strategy is ``fsdp2``.

        The networks of a task on the meta device are built on the CPU of rank 0, which distributes
        the shards. No other rank ever holds a whole network.

        Raises:
            TypeError: If the strategy is another sharding strategy of Lightning.
            ValueError: If the task was built on the meta device and the strategy does not shard, or
                if it shards and the task has a frozen teacher.
        """
        ranks = self.device_mesh
        if ranks is None:
            if self._empty:
                raise ValueError('a task on the meta device needs --trainer.strategy fsdp2')
            return
        # Imported here because it is slow.
        from geofm.strategies import FullyShardedStrategy, hand_out, shard_networks

        if not isinstance(self.trainer.strategy, FullyShardedStrategy):
            raise TypeError(
                f'{type(self.trainer.strategy).__name__} cannot save the checkpoints of '
                f'{type(self).__name__}: use --trainer.strategy fsdp2'
            )
        if self.distillation is not None:
            raise ValueError('fsdp2 does not shard a frozen teacher: use --trainer.strategy ddp')
        shard_networks(self, ranks['data_parallel'])
        if self._empty:
            built = self._build() if self.trainer.is_global_zero else None
            hand_out(built, self)
            statistics = None if built is None else built.model.statistics
            self.model.statistics = self.trainer.strategy.broadcast(statistics)
            self._empty = False

    def _build(self) -> Self:
        """Build the same task with the weights that it would have without the meta device."""
        arguments = {k: v for k, v in self.hparams.items() if not k.startswith('_')}
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._rng_state)
            return type(self)(**arguments, **{name: getattr(self, name) for name in self.ignore})

    def build_backbone(self, **kwargs: Any) -> MultiSensorViT:
        """Build the backbone that the hyperparameters describe, and load its initial weights.

        Args:
            kwargs: Further arguments of the model.

        Returns:
            The backbone.

        Raises:
            BandError: If the bands of the channels are unknown.
        """
        hparams = self.hparams
        backbone = create_backbone(hparams, **kwargs)
        if not backbone.bands:
            sensors = (hparams['model_args'] or {}).get('sensors', backbone.sensors)
            raise BandError(
                f'the bands of the {hparams["in_channels"]} channels are unknown: the sensors '
                f'{list(sensors)} have {len(bands_of(sensors))} bands. Set in_channels to that '
                'number, or name the channels with bands'
            )
        if self.weights and not self._empty:
            load_backbone_weights(backbone, self.weights)
        return backbone

    def prepare_trained(self, backbone: MultiSensorViT, hides_sensors: bool = False) -> None:
        """Make a backbone ready for training.

        Args:
            backbone: The backbone; changed in place.
            hides_sensors: Whether the method drops sensors in other ways than *sensor_dropout*.

        Raises:
            ValueError: If a setting needs several sensors and the model has one.
        """
        hparams = self.hparams
        if hparams['compile_blocks']:
            backbone.compile_blocks()
        backbone.set_grad_checkpointing(hparams['grad_checkpointing'])
        for name in ('sensor_dropout', 'one_sensor_masks'):
            if hparams[name] and len(backbone.sensors) < 2:
                raise ValueError(f'{name} needs a model with at least two sensors')
        if hparams['one_sensor_masks'] and len(backbone.encoder_bands) < 2:
            raise ValueError(
                'one_sensor_masks needs one ViT per sensor, or joint fusion: early fusion masks '
                'a patch in all sensors'
            )
        absent = len(sensor_channels(backbone.bands)) < len(backbone.sensors)
        hides = hparams['sensor_dropout'] or hides_sensors or absent
        if backbone.fusion is not None and not hides:
            # The missing-sensor tokens are never used, and weight decay must not change them.
            backbone.stand_in.requires_grad_(False)

    def build_distillation(self, image_size: int | None = None) -> FeatureDistillation | None:
        """Load the frozen teacher, if there is one.

        Args:
            image_size: Side in pixels of ``Crops.anchors``, the global crops without photometric
                augmentation, if another loss needs a certain size. None: the teacher chooses it.

        Returns:
            The module; None without a teacher.
        """
        if self.teacher is None:
            return None
        if not self.distills:
            raise ValueError(f'{type(self).__name__} does not support a teacher: leave it out')
        side = self.hparams['global_size'] // self.model.patch_size
        return FeatureDistillation(self.teacher, self.model, (side, side), image_size)

    def with_distillation(self, networks: Mapping[str, nn.Module]) -> nn.ModuleDict:
        """Add the distillation from a frozen teacher, if any, to trained networks.

        Args:
            networks: The other networks by name.

        Returns:
            All networks by name.
        """
        if self.distillation is None:
            return nn.ModuleDict(networks)
        return nn.ModuleDict({**networks, 'distillation': self.distillation})

    def distill(
        self, crops: Crops, cls: Tensor, patches: Tensor | None, learn: bool
    ) -> dict[str, Tensor]:
        """Compute the losses against the features of the frozen teacher, if there is one.

        Args:
            crops: Crops of a batch of B images.
            cls: CLS features of the trained backbone for the global crops, of shape (2B, D).
            patches: All patch features for the global crops, of shape (2B, N, D).
            learn: Whether to update the averages of the teacher's features, as in training.

        Returns:
            ``teacher_cls`` and ``teacher_patch``; nothing without a teacher.
        """
        if self.distillation is None:
            return {}
        assert patches is not None
        present = self._seen_sensors(None, crops.global_present)
        losses: dict[str, Tensor] = self.distillation(crops, cls, patches, present, learn)
        return losses

    def compile_heads(self, heads: nn.ModuleDict) -> None:
        """Compile the heads if *compile_blocks* is set.

        Args:
            heads: The heads; a ``backbone`` among them is left as it is. Changed in place; their
                state dicts do not change.
        """
        if self.hparams['compile_blocks']:
            for name, head in heads.items():
                if name != 'backbone':
                    # The number of tokens differs between batches.
                    head.compile(dynamic=True)

    def build_multi_crop(self, anchor_size: int | None = None) -> MultiCrop:
        """Build the multi-crop transform from the hyperparameters.

        Args:
            anchor_size: Side in pixels of ``Crops.anchors``, the global crops without photometric
                augmentation.
                Default: none, or the size that a frozen teacher needs.

        Returns:
            The transform.
        """
        hparams = self.hparams
        if self.distillation is not None:
            anchor_size = self.distillation.image_size
        return MultiCrop(
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
            anchor_size=anchor_size,
        )

    def views(self, crops: Crops, patches: Tensor | None = None) -> list[View]:
        """Make the views of the trained backbone: crops with masked patches and dropped sensors.

        Args:
            crops: Crops of a batch of B images, with n local crops per image.
            patches: Patches of the global crops whose tokens are returned in addition to CLS, see
                :class:`geofm.models.View`. Default: the masked patches.

        Returns:
            The 2B global crops and, if any, the nB local crops, for ``forward_views`` of the
            backbone.
        """
        wanted = crops.masked if patches is None else patches
        present = self._seen_sensors(self._global_sensors(len(crops.globals)), crops.global_present)
        views = [
            View(crops.globals, crops.global_dates, self._student_masks(crops), present, wanted)
        ]
        if len(crops.locals):
            present = self._seen_sensors(self._drop_sensors(len(crops.locals)), crops.local_present)
            views.append(View(crops.locals, crops.local_dates, None, present))
        return views

    def _global_sensors(self, crops: int) -> Tensor | None:
        """Choose the sensors that the trained backbone sees in each global crop; None: all."""
        return self._drop_sensors(crops)

    def _drop_sensors(self, crops: int) -> Tensor | None:
        """Choose the sensors that the trained backbone sees in each crop; None: all.

        The dropped sensors are any non-empty proper subset, with equal probability.
        """
        rate = self.hparams['sensor_dropout']
        if not rate:
            return None
        count = len(self.model.sensors)
        hidden, which = torch.rand(crops) < rate, torch.rand(crops)
        # The bits of the numbers 1 to 2^S - 2 are these subsets. Rounding must not give 2^S - 1.
        subset = 1 + (which * (2**count - 2)).long().clamp_max(2**count - 3)
        left_out = (subset[:, None] >> torch.arange(count)) & 1
        seen = ~(hidden[:, None] & left_out.bool())
        return to_device(seen, self.device)

    def _seen_sensors(self, chosen: Tensor | None, present: Tensor | None) -> Tensor | None:
        """Combine the chosen sensors with those present in the data.

        A crop without any of its chosen sensors keeps all sensors that are present.

        Args:
            chosen: Chosen sensors of each crop, bool of shape (N, S). None: all.
            present: Sensors of the input that are present, bool of shape (N, S'). None: all.

        Returns:
            Sensors that a network sees, bool of shape (N, S). None: all.
        """
        if present is None:
            return chosen
        present = self.model.of_all_sensors(present)
        if chosen is None:
            return present
        seen = chosen & present
        return torch.where(seen.any(dim=1, keepdim=True), seen, present)

    def _student_masks(self, crops: Crops) -> Tensor:
        """Return the masks of the patches, per sensor if *one_sensor_masks* is set."""
        rate = self.hparams['one_sensor_masks']
        if not rate:
            return crops.masks
        shape, count = crops.masks.shape, len(self.model.sensors)
        one, which = torch.rand(shape) < rate, torch.rand(shape)
        hidden_in = count - 1 - (which * count).long().clamp_max(count - 1)
        others = hidden_in[:, None] != torch.arange(count)[:, None]
        shown = one[:, None] & others
        return crops.masks[:, None] & ~to_device(shown, self.device)

    # -- steps ----------------------------------------------------------------------------------

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Compute the weighted sum of the losses.

        Args:
            losses: Losses by name, from :meth:`compute_losses`.

        Returns:
            Scalar.
        """
        weights = self.loss_weights
        if self.distillation is not None:
            weights = {**weights, **self.distillation.weights}
        return torch.stack([weights[name] * losses[name] for name in losses]).sum()

    def training_step(
        self, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Compute the training loss.

        Args:
            batch: The output of your DataLoader.
            batch_idx: Integer displaying index of this batch.
            dataloader_idx: Index of the current dataloader.

        Returns:
            ``loss``, and the diagnostics of :meth:`compute_losses`.

        Raises:
            FloatingPointError: If the loss of an earlier batch is not finite.
        """
        values = self._schedules().at(self.global_step)
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        seed = batch_seed(self.seed, 'train', number, self.global_rank)
        if self._guard.is_due:
            # With gradient accumulation, a check may be due between two optimiser steps.
            self._guard.agree(self.stop_signal)
            self._check_and_forget()
        step = Step(self.global_step, batch, seed, values, self.changing_state())
        self._state_before = self._state_before or step.state
        with seeded(seed, self.device):
            losses, watched = self.compute_losses(batch, values)
        loss = self.total(losses)
        self._guard.see(step, losses, loss)
        size = len(batch['image'])
        self.log('train_loss', loss, batch_size=size)
        self.log_dict({f'train_{k}': v for k, v in losses.items()}, batch_size=size)
        # On the CPU: Lightning would copy numbers to the device, and the progress bar wait for it.
        schedule = {f'schedule/{k}': torch.tensor(float(v)) for k, v in values.items()}
        self.log_dict(schedule, batch_size=size)
        if self._shown_loss is not None:
            shown = torch.tensor(self._shown_loss)
            self.log('loss', shown, prog_bar=True, logger=False, batch_size=size)
        return {'loss': loss, **watched}

    def _check_and_forget(self) -> None:
        self._check_finite()
        self._guard.forget()

    def _check_finite(self) -> None:
        """Read what the ranks last exchanged. All ranks stop together; none waits for another.

        Raises:
            FloatingPointError: If a loss or a gradient is not finite.
        """
        if (finding := self._guard.look()) is None:
            return
        self.agreed_signal = max(self.agreed_signal, finding.signal)
        self._shown_loss = finding.loss
        if finding.failed is not None:
            self._stop(finding.what, finding.failed)

    def _stop(self, what: str, failed: SeenBatch) -> None:
        """Stop a run with a loss or gradient that is not finite, and write its step to a file.

        Raises:
            FloatingPointError: Always.
        """
        step, values = failed.step, failed.norms if what == 'gradient' else failed.losses
        terms = {name: value.item() for name, value in values.items()}
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        path = write_dump(self, self.multi_crop.photometry, step, terms, folder)
        # The first rank that raises ends the others, so wait until all have written their files.
        self.trainer.strategy.barrier()
        files = getattr(getattr(self.trainer, 'datamodule', None), 'files', None)
        of = f' Files of the batch: {files(step.batch)}.' if files is not None else ''
        raise FloatingPointError(
            f'{what} is not finite at step {step.number}: {terms}. The step is saved in '
            f'{path} (`geofm replay` repeats it).{of} Check these data, lower the learning '
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
        # Use the same crops in every epoch, so that losses are comparable.
        with seeded(batch_seed(self.seed, split, batch_idx, self.global_rank), self.device):
            losses, _ = self.compute_losses(batch, None)
        size = len(batch['image'])
        self.log(f'{split}_loss', self.total(losses), batch_size=size, sync_dist=True)
        self.log_dict(
            {f'{split}_{k}': v for k, v in losses.items()}, batch_size=size, sync_dist=True
        )

    def predict_step(self, batch: Sample, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Embed images with :attr:`model`.

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

    # -- start, end and checkpoints of a run ----------------------------------------------------

    def setup(self, stage: str) -> None:
        """Set the statistics of augmentation and teacher to those of the data module.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.

        Raises:
            BandError: If the data module lacks a band of the model.
        """
        self.take_up_statistics()
        datamodule = getattr(self.trainer, 'datamodule', None)
        if datamodule is not None and statistics_of(getattr(datamodule, 'aug', None)) is None:
            rank_zero_warn(
                f'the normalisation of {type(datamodule).__name__} is unknown, so checkpoints '
                'cannot store the statistics of the input, and maps will use the built-in ones: '
                'wrap the data module in geofm.datamodules.NamedBandsDataModule',
                category=UserWarning,
            )
        if stage == 'fit':
            self.schedules = self._resumed = None

    def take_up_statistics(self) -> None:
        """Tell the augmentation and the frozen teacher how the data module normalises.

        Both convert images back to raw values.

        Raises:
            BandError: If the data module lacks a band of the model.
        """
        normalize = getattr(getattr(self.trainer, 'datamodule', None), 'aug', None)
        teacher = None if self.distillation is None else self.distillation.teacher
        undoing = [part for part in (self.multi_crop.photometry, teacher) if part is not None]
        if undoing and isinstance(normalize, Normalize):
            order = band_indices(self.model.bands, normalize.bands)
            mean, std = normalize.mean.flatten()[order], normalize.std.flatten()[order]
            for part in undoing:
                part.set_statistics(mean, std)

    def on_fit_start(self) -> None:
        """Check the precision, set the input's statistics, and report which attention is used.

        Raises:
            ValueError: If weights are in half precision.
        """
        check_precision(self)
        self.agreed_signal = 0
        # A gradient scaler synchronises in each step anyway, and skips steps itself.
        scaled = self.trainer.precision == '16-mixed'
        self._guard = FiniteGuard(1 if scaled else self.hparams['check_every_n_batches'])
        # Lightning warns of modules in evaluation mode, which teachers are on purpose.
        warnings.filterwarnings('ignore', r'Found \d+ module\(s\) in eval mode')
        self.take_up_statistics()
        dtype = AUTOCAST.get(str(self.trainer.precision), torch.float32)
        method, reason = choose_attention(self.device, dtype)
        rank_zero_info(f'Attention of packed crops: {method} ({reason})')

    def on_train_epoch_end(self) -> None:
        """Check the last batches of the epoch.

        Raises:
            FloatingPointError: If a loss or a gradient is not finite.
        """
        self._check_finite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store seed, progress, statistics of the input, and the teacher's description.

        Raises:
            FloatingPointError: If a loss or a gradient is not finite.
        """
        # A checkpoint must not count skipped steps.
        self._check_finite()
        checkpoint['seed'] = self.seed
        datamodule = getattr(self._trainer, 'datamodule', None)
        statistics = statistics_of(getattr(datamodule, 'aug', None)) or self.model.statistics
        checkpoint[METADATA] = carry_statistics(statistics)
        if self.distillation is not None:
            checkpoint[METADATA]['teacher'] = self.distillation.teacher.description
        if self._plan is not None and self._course is not None:
            before, step = (0, 0) if self._done is None else (self._done.samples, self._done.step)
            checkpoint[PROGRESS] = {
                'samples': before + (self.global_step - step) * self._plan.samples_per_step,
                'planned': self._course.samples,
                'course': astuple(self._course),
                'batch': self._plan.batch,
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the seed and the schedules of the resumed run."""
        self.seed = checkpoint.get('seed', self.seed)
        if self._trainer is not None:
            keys = ('loops', 'global_step', PROGRESS)
            self._resumed = {key: checkpoint[key] for key in keys if key in checkpoint}
            self.schedules = None

    # -- optimisation ---------------------------------------------------------------------------

    def _schedules(self) -> Schedules:
        """Return the schedules of this run, made on first use, when the data's length is known."""
        if self.schedules is None:
            settings = self.schedule_settings()
            # Lightning builds the loaders later; their length and batch size are needed now.
            self.trainer.fit_loop.setup_data()
            self._plan = plan = Plan.of(self.trainer)
            self._done = done = (
                None if self._resumed is None else read_progress(self._resumed, plan)
            )
            self._course = course = plan.course(done, self._steps_per_epoch(plan, settings))
            if course.steps < 1:
                raise ValueError(NO_STEPS)
            samples, step = (0.0, 0) if done is None else (done.samples, done.step)
            steps = np.arange(float(max(1, plan.steps_left(done))))
            places = (samples + steps * plan.samples_per_step) / course.samples_per_step
            self.schedules = dinov2_schedules(
                course.steps,
                course.steps_per_epoch,
                **{**settings, 'lr': settings['lr'] * self._lr_scale()},
                # Rounding errors must not shift a value to another step.
                places=places.round(6),
                first=step,
            )
        return self.schedules

    def _steps_per_epoch(self, plan: Plan, settings: Mapping[str, Any]) -> float:
        """Return the number of optimiser steps that count as an epoch in warm-ups."""
        given = self.hparams['samples_per_epoch']
        if given is not None:
            self._batch_size('samples_per_epoch')
            return float(given / plan.samples_per_step)
        if not math.isinf(plan.steps_per_epoch):
            return plan.steps_per_epoch
        counted = [f'{k}={v:g}' for k, v in settings.items() if k.endswith('_epochs') and v]
        if counted:
            raise ValueError(
                f'the data have no length, so {", ".join(counted)} cannot be converted to steps: '
                'set samples_per_epoch to the number of samples per epoch, or set these to 0'
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
            The optimizer. Learning rate and weight decay are set in each step.
        """
        hparams = self.hparams
        groups = parameter_groups(
            self.trained, self.model.depth, hparams['layer_decay'], hparams['patch_embed_lr_mult']
        )
        # The fused kernel unscales gradients itself, but clipping needs unscaled gradients.
        fused = self.trainer.precision != '16-mixed'
        lr = float(self._schedules().lr.max())
        return AdamW(groups, lr=lr, betas=hparams['betas'], fused=fused)

    def on_train_batch_start(self, batch: Sample, batch_idx: int) -> None:
        """Set the learning rates and the weight decay of this step."""
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
        """Clip the gradient norm of each sub-network separately.

        Args:
            optimizer: The optimizer.
            gradient_clip_val: Largest norm. None: *clip_grad* of the task.
            gradient_clip_algorithm: Not used; gradients are clipped by norm.

        Raises:
            FloatingPointError: If a loss is not finite, or a gradient without a gradient scaler.
        """
        largest = gradient_clip_val or self.hparams['clip_grad']
        trained = self.trained
        norms = gradient_norms(trained)
        # In half precision, the gradient scaler skips such a step and lowers its scale.
        if self.trainer.precision != '16-mixed':
            self._guard.see_gradient(norms)
        self._guard.agree(self.stop_signal)
        if self._guard.every > 1:
            self._skip_on_device(optimizer)
        self._state_before = {}
        if self._guard.is_due:
            self._check_and_forget()
        if largest:
            for name, module in trained.items():
                nn.utils.clip_grads_with_norm_(module.parameters(), largest, norms[name])

    @torch.no_grad()
    def _skip_on_device(self, optimizer: Optimizer) -> None:
        """Skip this step on the device if it, or an earlier one, is not finite."""
        skip = self._guard.skip()
        # The attribute through which PyTorch's gradient scaler makes a fused optimiser skip.
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        for name, before in self._state_before.items():
            now = self.get_buffer(name)
            now.copy_(torch.where(skip > 0, before, now))
