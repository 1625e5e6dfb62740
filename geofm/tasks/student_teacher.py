"""Base of methods with a student and an EMA teacher."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from geofm.device import to_device
from geofm.losses import resize_tokens
from geofm.models import MultiSensorViT, View, create_backbone
from geofm.tasks.pretraining import PretrainingTask
from geofm.transforms import Crops


class Outputs(NamedTuple):
    """Outputs of the student or the teacher for the crops of B images.

    Attributes:
        cls: Head outputs for CLS tokens: (2B, K) for the teacher, ((2 + n) B, K) for the student.
        patches: Head outputs for the M masked patches, (M, K').
        features: CLS features of the global crops, (2B, D).
        tokens: Patch tokens of the global crops, (2B, N, D), if Gram anchoring or a frozen teacher
            needs them; otherwise None.
    """

    cls: Tensor
    patches: Tensor
    features: Tensor
    tokens: Tensor | None = None


class StudentTeacher(PretrainingTask):
    """Base class of tasks whose targets come from an EMA teacher.

    The student sees all crops, with masked patches in the global ones. The teacher sees the global
    crops without masks. After each optimiser step the teacher moves towards the student.

    A subclass follows :class:`~geofm.tasks.PretrainingTask` and defines
    :meth:`build_heads` (called twice, for student and teacher), :meth:`apply_heads`, and
    ``compute_losses``, which calls :meth:`teacher_forward` (without gradients) and
    :meth:`student_forward`. If losses change state such as centres, it also extends
    ``changing_state``.

    Attributes:
        model: The teacher's backbone, which is kept after training.
        student: The student's ``backbone`` and heads.
        teacher_heads: The teacher's heads.
        gram_backbone: Backbone of an earlier teacher, for Gram anchoring.
    """

    student: nn.ModuleDict
    teacher_heads: nn.ModuleDict
    gram_backbone: MultiSensorViT | None

    optional_weights: tuple[str, ...] = (*PretrainingTask.optional_weights, 'gram_backbone.')

    def __init__(
        self,
        momentum: tuple[float, float] = (0.992, 1.0),
        global_sensors: tuple[str | list[str], str | list[str]] | None = None,
        gram_weight: float = 0.0,
        gram_size: int | None = None,
        gram_refresh_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialize the task.

        Args:
            momentum: Initial and final momentum of the teacher.
            global_sensors: Sensors of the global crops that the student sees, and those that the
                teacher sees; each a key or a list of keys. The student then predicts the features
                of the teacher's sensors from its own. Default: all sensors for both.
            gram_weight: Weight of Gram anchoring to an earlier teacher. DINOv3 uses 2.
            gram_size: Side in pixels of the global crops of the Gram teacher. Default:
                *global_size*. DINOv3 uses twice *global_size*.
            gram_refresh_steps: Optimiser steps after which the present teacher replaces the Gram
                teacher. Default: the Gram teacher never changes.
            kwargs: Arguments of :class:`~geofm.tasks.PretrainingTask`.

        Raises:
            ValueError: If an argument needs several sensors and the model has one.
        """
        super().__init__(**kwargs)
        self._refresh_gram_teacher()

    @abstractmethod
    def apply_heads(
        self, heads: nn.ModuleDict, cls: Tensor, patches: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply heads to the features of a network.

        Args:
            heads: The modules of :meth:`build_heads`, for student or teacher.
            cls: CLS tokens of shape (N, D).
            patches: Tokens of the M masked patches, of shape (M, D).

        Returns:
            Outputs that the losses compare: (N, K) for CLS tokens and (M, K') for patches.
        """

    @property
    def trained(self) -> nn.ModuleDict:
        """The student: ``backbone`` and heads, whose gradients are clipped separately."""
        return self.with_distillation(dict(self.student.items()))

    def schedule_settings(self) -> dict[str, Any]:
        """Return the settings of the schedules, with the momentum.

        Returns:
            Arguments of :func:`geofm.tasks.schedules.dinov2_schedules`.
        """
        return {**super().schedule_settings(), 'momentum': self.hparams['momentum']}

    # -- networks -------------------------------------------------------------------------------

    def configure_models(self) -> None:
        """Initialize student, teacher and the multi-crop transform."""
        hparams = self.hparams
        with self.device_of_networks():
            self.model = self.build_backbone()
            backbone = create_backbone(hparams, drop_path_rate=hparams['drop_path_rate'])
            # TorchGeo takes every key with 'model.' for the backbone's, so no key here may have it.
            self.student = nn.ModuleDict({'backbone': backbone, **self.build_heads()})
            self.teacher_heads = nn.ModuleDict(self.build_heads())
        backbone.load_state_dict(self.model.state_dict())
        for heads in (self.student, self.teacher_heads):
            self.compile_heads(heads)
        for name, head in self.teacher_heads.items():
            head.load_state_dict(self.student[name].state_dict())
        self.model.requires_grad_(False)
        self.teacher_heads.requires_grad_(False)
        if hparams['compile_blocks']:
            self.model.compile_blocks()
        self.gram_backbone = copy.deepcopy(self.model) if hparams['gram_weight'] else None
        self._check_global_sensors()
        self.prepare_trained(backbone, hides_sensors=bool(hparams['global_sensors']))
        anchor_size = self._gram_size()
        self.distillation = self.build_distillation(anchor_size)
        self.multi_crop = self.build_multi_crop(anchor_size)
        # Lightning does not change the modes of modules when training starts.
        self.train()

    def _gram_size(self) -> int | None:
        """Return the side of the Gram teacher's crops; None without a Gram teacher."""
        if not self.hparams['gram_weight']:
            return None
        size: int = self.hparams['gram_size'] or self.hparams['global_size']
        if size <= 0 or size % self.model.patch_size:
            raise ValueError(
                f'gram_size {size} must be a positive multiple of {self.model.patch_size}'
            )
        return size

    def _check_global_sensors(self) -> None:
        sensors = self.model.sensors
        seen = [_keys(keys) for keys in self.hparams['global_sensors'] or ()]
        if seen and len(sensors) < 2:
            raise ValueError('global_sensors needs a model with at least two sensors')
        if unknown := {key for keys in seen for key in keys} - set(sensors):
            raise ValueError(f'global_sensors: {sorted(unknown)} are not among {list(sensors)}')
        if seen and (len(seen) != 2 or not all(seen)):
            raise ValueError(
                'global_sensors must have two entries: for the student and for the teacher'
            )

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of the student; the teacher is always in evaluation mode.

        Args:
            mode: Whether the student is in training mode.

        Returns:
            The task.
        """
        super().train(mode)
        for network in self._teachers():
            network.eval()
        return self

    def _teachers(self) -> list[nn.Module]:
        """Return the networks that follow the student and are never trained."""
        networks = [self.model, self.teacher_heads, self.gram_backbone]
        return [network for network in networks if network is not None]

    def setup(self, stage: str) -> None:
        """Set the statistics of the input and, for training, prepare the teacher.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.

        Raises:
            BandError: If the data module lacks a band of the model.
            ValueError: If student and teacher have different parameters.
        """
        super().setup(stage)
        if stage == 'fit':
            self.prepare_teacher()

    def prepare_teacher(self) -> None:
        """Freeze the teacher, and check that it has the parameters of the student.

        Raises:
            ValueError: If the parameters differ, e.g. if only the student has adapters.
        """
        for network in self._teachers():
            network.requires_grad_(False).eval()
        teacher, student = (dict(pairs) for pairs in (self._of_teacher(), self._of_student()))
        if list(teacher) != list(student):
            differ = sorted(teacher.keys() ^ student.keys()) or ['their order']
            raise ValueError(
                f'student and teacher have different parameters, e.g. {differ[0]}: change both in '
                "the same way, task.student['backbone'] and task.model"
            )

    def _of_teacher(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters of the teacher under their names in the student."""
        backbone = [(f'backbone.{name}', p) for name, p in self.model.named_parameters()]
        return backbone + list(self.teacher_heads.named_parameters())

    def _of_student(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters of the student, in the order of :meth:`_of_teacher`."""
        return [
            (f'{network}.{name}', parameter)
            for network in ('backbone', *self.teacher_heads)
            for name, parameter in self.student[network].named_parameters()
        ]

    # -- forward passes -------------------------------------------------------------------------

    def teacher_forward(self, crops: Crops) -> Outputs:
        """Run the teacher on the global crops without masks.

        Args:
            crops: Crops of a batch of B images.

        Returns:
            Outputs for CLS tokens and for the patches that are masked for the student.
        """
        present = self._seen_sensors(
            self._listed_sensors('teacher', len(crops.globals)), crops.global_present
        )
        view = View(crops.globals, crops.global_dates, None, present, crops.masked)
        (tokens,) = self.model.forward_views([view])
        return Outputs(*self.apply_heads(self.teacher_heads, *tokens), tokens.cls)

    def student_forward(self, crops: Crops) -> Outputs:
        """Run the student on all crops, with masked patches in the global ones.

        Args:
            crops: Crops of a batch of B images, with n local crops per image.

        Returns:
            Outputs for the CLS tokens of all crops and for the masked patches.
        """
        backbone = cast(MultiSensorViT, self.student['backbone'])
        images, patches = crops.masks.shape
        dense = self.gram_backbone is not None or self.distillation is not None
        wanted = torch.arange(crops.masks.numel(), device=self.device) if dense else crops.masked
        tokens = backbone.forward_views(self.views(crops, wanted))

        features, hidden = tokens[0]
        every = hidden.view(images, patches, -1) if dense else None
        if dense:
            hidden = hidden[crops.masked]
        cls = torch.cat([view.cls for view in tokens])
        return Outputs(*self.apply_heads(self.student, cls, hidden), features, every)

    @torch.no_grad()
    def gram_forward(self, crops: Crops) -> Tensor:
        """Run the Gram teacher on the anchors: global crops of *gram_size*, not augmented.

        Args:
            crops: Crops of a batch of B images.

        Returns:
            Patch tokens on the student's grid, of shape (2B, N, D).
        """
        assert self.gram_backbone is not None
        assert crops.anchors is not None
        present = self._seen_sensors(None, crops.global_present)
        tokens = self.gram_backbone.forward_features(
            crops.anchors, crops.global_dates, present=present
        )
        side = crops.anchors.shape[-1] // self.model.patch_size
        patches = tokens[:, self.model.num_prefix_tokens :]
        return resize_tokens(patches, (side, side), self.multi_crop.grid)

    def _global_sensors(self, crops: int) -> Tensor | None:
        """Choose the sensors that the student sees in each global crop; None: all."""
        chosen = self._listed_sensors('student', crops)
        return super()._global_sensors(crops) if chosen is None else chosen

    def _listed_sensors(self, network: Literal['student', 'teacher'], crops: int) -> Tensor | None:
        """Return the sensors of *global_sensors* for a network; None: all."""
        if not self.hparams['global_sensors']:
            return None
        keys = _keys(self.hparams['global_sensors'][network == 'teacher'])
        seen = torch.tensor([key in keys for key in self.model.sensors])
        return to_device(seen, self.device).expand(crops, -1)

    # -- update of the teacher ------------------------------------------------------------------

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step the optimiser, then move the teacher towards the student.

        The teacher moves here and not at the end of the batch, because a callback may save a
        checkpoint before that.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.move_teacher(self._schedules().at(self.global_step)['momentum'])
        every = self.hparams['gram_refresh_steps']
        if every and (self.global_step + 1) % every == 0:
            self._refresh_gram_teacher()

    @torch.no_grad()
    def move_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student.

        Args:
            momentum: Weight of the teacher in the moving average, 0 to 1.
        """
        teacher: list[Tensor] = [parameter for _, parameter in self._of_teacher()]
        student: list[Tensor] = [parameter for _, parameter in self._of_student()]
        torch._foreach_lerp_(teacher, student, 1 - momentum)

    def _refresh_gram_teacher(self) -> None:
        if self.gram_backbone is not None:
            self.gram_backbone.load_state_dict(self.model.state_dict())


def _keys(sensors: str | Sequence[str]) -> Sequence[str]:
    """Return a list of keys for one key or several."""
    return [sensors] if isinstance(sensors, str) else sensors
