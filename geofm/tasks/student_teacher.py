"""Student and teacher: how they are built, what they see, and how the one follows the other."""

import copy
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self, cast

import torch
from lightly.models.modules import DINOv2ProjectionHead
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchgeo.tasks import BaseTask

from geofm.losses import resize_tokens
from geofm.models import MultiSensorViT, View, create_backbone, load_backbone_weights
from geofm.models.weights.load import Weights
from geofm.sensors import BandError, band_indices, bands_of, sensor_channels
from geofm.transforms import Crops, MultiCrop, Normalize
from geofm.transforms.statistics import statistics_of


class Outputs(NamedTuple):
    """What a network makes of the crops of B images.

    Attributes:
        cls: CLS logits, (2B, K) of the teacher, ((2 + n) B, K) of the student.
        patches: Logits of the M masked patches, (M, K').
        features: CLS features of the global crops, (2B, D).
        tokens: Patch tokens of the global crops, (2B, N, D), if Gram anchoring wants them.
    """

    cls: Tensor
    patches: Tensor
    features: Tensor
    tokens: Tensor | None = None


class StudentTeacher(BaseTask):
    """The networks of :class:`geofm.tasks.DINOv2`, built from its hyperparameters.

    Attributes:
        model: The teacher's backbone: what one keeps.
        student: The student's ``backbone`` and heads.
        teacher_heads: The teacher's heads.
        gram_backbone: An earlier teacher's backbone, for Gram anchoring.
        multi_crop: What makes crops of a batch.
    """

    model: MultiSensorViT
    student: nn.ModuleDict
    teacher_heads: nn.ModuleDict
    gram_backbone: MultiSensorViT | None
    multi_crop: MultiCrop
    weights: Weights | None

    def configure_models(self) -> None:
        """Initialize student, teacher and the cropping of their input."""
        hparams = self.hparams
        self.model = create_backbone(hparams)
        if not self.model.bands:
            sensors = (hparams['model_args'] or {}).get('sensors', self.model.sensors)
            raise BandError(
                f'in_channels={hparams["in_channels"]} does not tell which bands the channels are: '
                f'the sensors {list(sensors)} have {len(bands_of(sensors))}. Set in_channels to '
                'that, or name the channels with bands'
            )
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
        for network in (backbone, self.model):
            if hparams['compile_blocks']:
                network.compile_blocks()
        backbone.set_grad_checkpointing(hparams['grad_checkpointing'])
        self.gram_backbone = copy.deepcopy(self.model) if hparams['gram_weight'] else None
        for name in ('sensor_dropout', 'one_sensor_masks', 'global_sensors'):
            if hparams[name] and len(backbone.sensors) < 2:
                raise ValueError(f'{name} needs a model with two sensors or more')
        if hparams['one_sensor_masks'] and len(backbone.encoder_bands) < 2:
            raise ValueError(
                'one_sensor_masks needs a ViT for each sensor, or joint fusion: early fusion hides '
                'a patch in all sensors'
            )
        seen = [_keys(keys) for keys in hparams['global_sensors'] or ()]
        if unknown := {key for keys in seen for key in keys} - set(backbone.sensors):
            raise ValueError(f'global_sensors {sorted(unknown)}: not of {list(backbone.sensors)}')
        if seen and (len(seen) != 2 or not all(seen)):
            raise ValueError('global_sensors must be two: what the student sees, and the teacher')
        absent = len(sensor_channels(backbone.bands)) < len(backbone.sensors)
        hides = hparams['sensor_dropout'] or hparams['global_sensors'] or absent
        if backbone.fusion is not None and not hides:
            # Never used: it must not decay.
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
            anchor_size=(hparams['gram_size'] or hparams['global_size'])
            if hparams['gram_weight']
            else None,
        )
        # Lightning leaves the modes of the modules as they are when it starts to train.
        self.train()

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

    def setup(self, stage: str) -> None:
        """Take up the statistics that the data module normalises with, for the photometry.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.

        Raises:
            BandError: If the data module lacks a band of the model.
        """
        self.take_up_statistics()
        datamodule = getattr(self.trainer, 'datamodule', None)
        if datamodule is not None and statistics_of(getattr(datamodule, 'aug', None)) is None:
            rank_zero_warn(
                f'how {type(datamodule).__name__} normalises is not known, so checkpoints cannot '
                'carry the statistics of the input, and maps will use the built-in ones: wrap it '
                'in geofm.datamodules.NamedBandsDataModule',
                category=UserWarning,
            )

    def take_up_statistics(self) -> None:
        """Have the photometry undo the normalisation of the data module in use.

        Raises:
            BandError: If the data module lacks a band of the model.
        """
        normalize = getattr(getattr(self.trainer, 'datamodule', None), 'aug', None)
        photometry = self.multi_crop.photometry
        if photometry is not None and isinstance(normalize, Normalize):
            order = band_indices(self.model.bands, normalize.bands)
            photometry.set_statistics(
                normalize.mean.flatten()[order], normalize.std.flatten()[order]
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
        """Networks that follow the student and are never trained."""
        networks = [self.model, self.teacher_heads, self.gram_backbone]
        return [network for network in networks if network is not None]

    def prepare_teacher(self) -> None:
        """Make the teacher ready to follow the student, whatever was done to either before.

        Raises:
            ValueError: If their parameters differ, e.g. with adapters in the student alone.
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
        """Parameters of the teacher, by the names that the student has for them."""
        backbone = [(f'backbone.{name}', p) for name, p in self.model.named_parameters()]
        return backbone + list(self.teacher_heads.named_parameters())

    def _of_student(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters of the student, in the order of :meth:`_of_teacher`."""
        return [
            (f'{network}.{name}', parameter)
            for network in ('backbone', *self.teacher_heads)
            for name, parameter in self.student[network].named_parameters()
        ]

    def teacher_forward(self, crops: Crops) -> Outputs:
        """Teacher on the global crops, nothing hidden.

        Args:
            crops: Crops of a batch of B images.

        Returns:
            Logits of CLS tokens and of the patches that the student does not see.
        """
        present = self._seen(self._only('teacher', len(crops.globals)), crops.global_present)
        view = View(crops.globals, crops.global_dates, None, present, crops.masked)
        (tokens,) = self.model.forward_views([view])
        return Outputs(*_apply_heads(self.teacher_heads, *tokens), tokens.cls)

    def student_forward(self, crops: Crops) -> Outputs:
        """Student on all crops, with patches of the global ones hidden.

        Args:
            crops: Crops of a batch of B images, n of them local.

        Returns:
            Logits of the CLS tokens of all crops and of the hidden patches.
        """
        backbone = cast(MultiSensorViT, self.student['backbone'])
        images, patches = crops.masks.shape
        anchored = self.gram_backbone is not None
        wanted = torch.arange(crops.masks.numel(), device=self.device) if anchored else crops.masked
        present = self._only('student', images)
        if present is None:
            present = self._drop_sensors(images)
        present = self._seen(present, crops.global_present)
        views = [View(crops.globals, crops.global_dates, self._hidden(crops), present, wanted)]
        if len(crops.locals):
            present = self._seen(self._drop_sensors(len(crops.locals)), crops.local_present)
            views.append(View(crops.locals, crops.local_dates, None, present))
        tokens = backbone.forward_views(views)

        features, hidden = tokens[0]
        every = hidden.view(images, patches, -1) if anchored else None
        if anchored:
            hidden = hidden[crops.masked]
        cls = torch.cat([view.cls for view in tokens])
        return Outputs(*_apply_heads(self.student, cls, hidden), features, every)

    @torch.no_grad()
    def gram_forward(self, crops: Crops) -> Tensor:
        """Gram teacher on the anchors: global crops without photometry, perhaps larger.

        Args:
            crops: Crops of a batch of B images.

        Returns:
            Patch tokens on the student's grid, of shape (2B, N, D).
        """
        assert self.gram_backbone is not None
        assert crops.anchors is not None
        present = self._seen(None, crops.global_present)
        tokens = self.gram_backbone.forward_features(
            crops.anchors, crops.global_dates, present=present
        )
        side = crops.anchors.shape[-1] // self.model.patch_size
        patches = tokens[:, self.model.num_prefix_tokens :]
        return resize_tokens(patches, (side, side), self.multi_crop.grid)

    def _only(self, network: Literal['student', 'teacher'], crops: int) -> Tensor | None:
        """Which sensors a network sees of the global crops; None: all."""
        if not self.hparams['global_sensors']:
            return None
        keys = _keys(self.hparams['global_sensors'][network == 'teacher'])
        seen = torch.tensor([key in keys for key in self.model.sensors])
        return seen.expand(crops, -1).to(self.device, non_blocking=True)

    def _drop_sensors(self, crops: int) -> Tensor | None:
        """Which sensors the student sees in each crop: all, or at random some of them.

        All subsets that leave out some sensor, but not every one, are equally likely.
        """
        rate = self.hparams['sensor_dropout']
        if not rate:
            return None
        count = len(self.model.sensors)
        hidden, which = torch.rand(crops) < rate, torch.rand(crops)
        # The bits of 1 to 2^S - 2 are these subsets. Rounding must not reach 2^S - 1.
        subset = 1 + (which * (2**count - 2)).long().clamp_max(2**count - 3)
        left_out = (subset[:, None] >> torch.arange(count)) & 1
        seen = ~(hidden[:, None] & left_out.bool())
        return seen.to(self.device, non_blocking=True)

    def _seen(self, chosen: Tensor | None, present: Tensor | None) -> Tensor | None:
        """Sensors that a network sees: of those chosen the ones that the data have.

        Where the data have none of those chosen, the network sees all that they have.

        Args:
            chosen: Which sensors are to be seen in each crop, bool of shape (N, S). None: all.
            present: Which sensors of the input the data have, bool of shape (N, S'). None: all.
        """
        if present is None:
            return chosen
        present = self.model.of_all_sensors(present)
        if chosen is None:
            return present
        seen = chosen & present
        return torch.where(seen.any(dim=1, keepdim=True), seen, present)

    def _hidden(self, crops: Crops) -> Tensor:
        """Patches that the student does not see, in all sensors, or some in one sensor only."""
        rate = self.hparams['one_sensor_masks']
        if not rate:
            return crops.masks
        shape, count = crops.masks.shape, len(self.model.sensors)
        one, which = torch.rand(shape) < rate, torch.rand(shape)
        hidden_in = count - 1 - (which * count).long().clamp_max(count - 1)
        others = hidden_in[:, None] != torch.arange(count)[:, None]
        shown = one[:, None] & others
        return crops.masks[:, None] & ~shown.to(self.device, non_blocking=True)

    @torch.no_grad()
    def move_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student.

        Args:
            momentum: Share of the teacher that stays.
        """
        teacher: list[Tensor] = [parameter for _, parameter in self._of_teacher()]
        student: list[Tensor] = [parameter for _, parameter in self._of_student()]
        torch._foreach_lerp_(teacher, student, 1 - momentum)

    def _refresh_gram_teacher(self) -> None:
        if self.gram_backbone is not None:
            self.gram_backbone.load_state_dict(self.model.state_dict())


def _keys(sensors: str | Sequence[str]) -> Sequence[str]:
    """Keys of the sensors that a network sees: one, or several."""
    return [sensors] if isinstance(sensors, str) else sensors


def _apply_heads(heads: nn.ModuleDict, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """CLS and patch logits; one head for both runs once."""
    if 'ibot_head' in heads:
        return heads['dino_head'](cls), heads['ibot_head'](patches)
    cls_logits, patch_logits = heads['dino_head'](torch.cat([cls, patches])).split(
        [len(cls), len(patches)]
    )
    return cls_logits, patch_logits
