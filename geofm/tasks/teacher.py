"""Frozen, pretrained models as teachers of a student with other sensors or another size."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from geofm.losses import FeatureLoss, resize_tokens
from geofm.models import MODEL_NAMES, NO_DATE, MultiSensorViT, TimmViT, has_cls_token, load_model
from geofm.models.checkpoints import HUB_WEIGHTS, CheckpointError
from geofm.sensors import RGB_BANDS, BandError, band_indices, band_statistics, sensor_of
from geofm.transforms import (
    NO_STATISTICS,
    PICTURE_WHITE,
    Crops,
    InputStatistics,
    Normalize,
    Picture,
    Standardize,
)


@dataclass
class Teacher:
    """Pretrained model whose features a student learns.

    Attributes:
        model: Checkpoint that `geofm fit` wrote, or an export of it; or, with *weights*, the name
            of a geofm or timm model, such as `vit_small_patch14_dinov2` or
            `vit_small_patch16_dinov3`.
        weights: File with the weights of the named model, in timm's format or as DINOv2 and DINOv3
            are published. Nothing is downloaded.
        bands: Bands of the model's channels, in their order. Default: the bands of the checkpoint;
            for models of timm, red, green and blue of Sentinel-2. The student must have them.
        image_size: Side in pixels to which the student's global crops are resized for the teacher.
            Default: the size with as many patches as the student's crops.
        mean: Mean per band, in the unit of the band (S2: DN), that the model was trained with.
            Default: that of the checkpoint. Models of timm by default see a picture with values of
            0 to 1, normalised with the model's own mean and standard deviation.
        std: Standard deviation per band, likewise.
        white: DN (reflectance x 10,000) that becomes 1 in such a picture. Use 10000 for plain
            reflectance.
        model_args: Further arguments of the named model.
        cls_weight: Weight of the loss of the CLS features.
        patch_weight: Weight of the loss of the patch features.
    """

    model: str
    weights: str | None = None
    bands: list[str] | None = None
    image_size: int | None = None
    mean: dict[str, float] | None = None
    std: dict[str, float] | None = None
    white: float = PICTURE_WHITE
    model_args: dict[str, Any] | None = None
    cls_weight: float = 1.0
    patch_weight: float = 1.0


class FrozenTeacher(nn.Module):
    """Module that applies a pretrained model to the student's crops, with bands matched by name.

    The model is not registered as a submodule. It is therefore not saved, trained, wrapped or set
    to training mode with the task; it only moves between devices with it.

    Attributes:
        network: The model.
        bands: The bands of the model.
        description: Description for checkpoints: model, bands, name and SHA-256 of the file.
    """

    network: MultiSensorViT | TimmViT
    mean: Tensor
    std: Tensor

    def __init__(self, teacher: Teacher, bands: tuple[str, ...]) -> None:
        """Load the model.

        Args:
            teacher: Configuration of the teacher.
            bands: Bands of the student, in the order of its channels.

        Raises:
            CheckpointError: If the file cannot be read or does not fit.
            BandError: If the student lacks a band of the model, or the normalisation of the
                model's input is unknown.
        """
        super().__init__()
        path = Path(teacher.weights or teacher.model)
        if not path.exists():
            what = '' if teacher.weights else '; a model name needs weights'
            raise CheckpointError(f'teacher: {path}: no such file{what}. Give an existing file')
        named = None if teacher.weights is None else teacher.model
        given = teacher.bands
        if named is not None and named not in MODEL_NAMES and given is None:
            given = list(RGB_BANDS)
        # The initial weights of the student must not depend on those of the teacher.
        with torch.random.fork_rng(devices=[]):
            network = load_model(path, named, given, teacher.model_args)
        self.__dict__['network'] = network.requires_grad_(False).eval()
        self.bands = network.bands
        try:
            self._channels = band_indices(network.bands, bands)
        except BandError as error:
            raise BandError(
                f'teacher {teacher.model} needs bands that the student lacks: {error}'
            ) from error
        self.normalize = _normalization(teacher, network)
        self.has_cls = has_cls_token(network)
        self.description = {
            'model': named or path.name,
            'bands': list(network.bands),
            'file': path.name,
            'sha256': _hash(path),
        }
        mean, std = band_statistics(bands)
        self.register_buffer('mean', mean[self._channels].view(-1, 1, 1), persistent=False)
        self.register_buffer('std', std[self._channels].view(-1, 1, 1), persistent=False)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the statistics that the student's input is normalised with.

        Initially these are the statistics of the sensors.

        Args:
            mean: Mean per band of the student in raw units, shape (C,).
            std: Standard deviation per band, likewise.
        """
        self.mean = mean[self._channels].view(-1, 1, 1).to(self.mean)
        self.std = std[self._channels].view(-1, 1, 1).to(self.std)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply a function, e.g. a move to a device, to the model as well."""
        self.network._apply(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, images: Tensor, dates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute the features of images.

        Args:
            images: Normalised images with the student's bands, of shape (N, C, H, W).
            dates: Dates, int64 of shape (N, T), with a column for each of the model's
                ``date_sensors``, if it supports dates.

        Returns:
            CLS features (N, D), or the mean of the patches for a model without CLS; and patch
            features (N, h x w, D).
        """
        raw = images[:, self._channels] * self.std + self.mean
        tokens = self.network.observe(self.normalize(raw), dates).tokens
        patches = tokens[:, self.network.num_prefix_tokens :]
        return tokens[:, 0] if self.has_cls else patches.mean(dim=1), patches


class FeatureDistillation(nn.Module):
    """Losses between the features of a student and of a frozen teacher.

    As in AM-RADIO (Ranzinger et al., 2024, https://arxiv.org/abs/2312.06709), linear projections of
    the student's CLS and patch features predict those of the teacher. The teacher's patches are
    resized to the student's grid. The losses are those of UNIC, see
    :class:`geofm.losses.FeatureLoss`. The teacher sees the student's global crops without masks
    and photometric augmentation.

    Attributes:
        teacher: The frozen teacher.
        image_size: Side in pixels of the crops that the teacher sees.
        weights: Factor of each loss by name.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: MultiSensorViT,
        grid: tuple[int, int],
        image_size: int | None = None,
    ) -> None:
        """Load the teacher, and build the projections of the student's features.

        Args:
            teacher: Configuration of the teacher.
            student: The student's backbone.
            grid: Number of patches of the student's global crops, (rows, columns).
            image_size: Side in pixels of the anchors that other losses need; None: any.

        Raises:
            CheckpointError: If the file cannot be read or does not fit.
            BandError: If the student lacks a band of the teacher, or the normalisation of the
                teacher's input is unknown.
            ValueError: If the teacher does not support images of that size.
        """
        super().__init__()
        self.teacher = FrozenTeacher(teacher, student.bands)
        self.grid = grid
        self.image_size = _size(teacher, self.teacher.network, grid, image_size)
        self.weights = {'teacher_cls': teacher.cls_weight, 'teacher_patch': teacher.patch_weight}
        width = self.teacher.network.embed_dim
        self.heads = nn.ModuleDict(
            {name: nn.Linear(student.embed_dim, width) for name in self.weights}
        )
        self.criteria = nn.ModuleDict({name: FeatureLoss(width) for name in self.weights})
        self._sensors = [student.sensors.index(key) for key in self.teacher.network.sensors]
        self._columns = _date_columns(self.teacher.network, student)

    def forward(
        self, crops: Crops, cls: Tensor, patches: Tensor, present: Tensor | None, learn: bool
    ) -> dict[str, Tensor]:
        """Compute the losses of the global crops of B images.

        Args:
            crops: Crops whose ``anchors``, the global crops that the teacher sees, have sides of
                :attr:`image_size` pixels.
            cls: CLS features of the student, of shape (2B, D).
            patches: Patch features of the student, of shape (2B, N, D).
            present: Whether each sensor of the student is present, bool of shape (2B, S). Crops
                without a sensor of the teacher are ignored. None: all are present.
            learn: Whether to update the averages of the teacher's features.

        Returns:
            Losses by name.
        """
        assert crops.anchors is not None
        dates = None
        if crops.global_dates is not None and self._columns is not None:
            # Append a column of unknown dates, for sensors that the student does not have.
            none = torch.full_like(crops.global_dates[:, :1], NO_DATE)
            dates = torch.cat([crops.global_dates, none], dim=1)[:, self._columns]
        taught_cls, taught_patches = self.teacher(crops.anchors, dates)
        side = self.image_size // self.teacher.network.patch_size
        taught_patches = resize_tokens(taught_patches, (side, side), self.grid)
        counted = None if present is None else present[:, self._sensors].all(dim=1)
        losses = {}
        for name, features, taught in (
            ('teacher_cls', cls[:, None], taught_cls[:, None]),
            ('teacher_patch', patches, taught_patches),
        ):
            rows = None if counted is None else counted.repeat_interleave(features.shape[1])
            criterion, targets = cast(FeatureLoss, self.criteria[name]), taught.flatten(0, 1)
            predictions = self.heads[name](features.flatten(0, 1))
            with torch.autocast(cls.device.type, enabled=False):
                if learn:
                    criterion.update(targets, rows)
                losses[name] = criterion(predictions, targets, rows)
        return losses


def _normalization(teacher: Teacher, network: MultiSensorViT | TimmViT) -> nn.Module:
    """Build the module that normalises raw values for the model."""
    bands = list(network.bands)
    if teacher.mean is not None or teacher.std is not None:
        mean, std = teacher.mean or {}, teacher.std or {}
        if not set(mean) == set(std) == set(bands):
            raise BandError(f'teacher: mean and std must have the bands {bands}')
        return _Image(InputStatistics(mean, std, None).normalize(bands))
    if network.statistics is not None or isinstance(network, MultiSensorViT):
        return _Image((network.statistics or NO_STATISTICS).normalize(bands))
    pictured = network.pretrained_cfg or {}
    own = [list(pictured.get(name) or ()) for name in ('mean', 'std')]
    reflects = all(sensor_of(band).quantity == 'reflectance' for band in bands)
    if not reflects or {len(values) for values in own} != {len(bands)}:
        raise BandError(
            f'teacher: the normalisation of {teacher.model} for the bands {bands} is unknown: give '
            'mean and std of each band in its unit'
        )
    return nn.Sequential(Picture(teacher.white), Standardize(*own))


class _Image(nn.Module):
    """Module that applies a normalisation of samples to an image tensor."""

    def __init__(self, normalize: Normalize) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, image: Tensor) -> Tensor:
        normalized: Tensor = self.normalize({'image': image})['image']
        return normalized


def _size(
    teacher: Teacher,
    network: MultiSensorViT | TimmViT,
    grid: tuple[int, int],
    wanted: int | None,
) -> int:
    """Return the side in pixels of the images that the teacher sees."""
    patch = network.patch_size
    fixed = None
    vit: Any = getattr(network, 'vit', None)
    if vit is not None and not getattr(vit, 'dynamic_img_size', False):
        fixed = int(vit.patch_embed.img_size[0])
    size = teacher.image_size or wanted or fixed or grid[0] * patch
    if wanted is not None and size != wanted:
        raise ValueError(
            f'teacher: image_size is {size}, but gram_size is {wanted}: they must be equal'
        )
    if size <= 0 or size % patch:
        raise ValueError(f'teacher: image_size {size} must be a positive multiple of {patch}')
    if fixed is not None and size != fixed:
        raise ValueError(f'teacher: {teacher.model} needs images of {fixed} px, not {size}')
    return size


def _date_columns(network: MultiSensorViT | TimmViT, student: MultiSensorViT) -> list[int] | None:
    """Return the column of the student's dates per sensor of the teacher; -1: no dates.

    The result is None if the teacher does not use dates.
    """
    if not isinstance(network, MultiSensorViT):
        return None
    own = list(student.date_sensors)
    return [own.index(key) if key in own else -1 for key in network.date_sensors]


def _hash(path: Path) -> str:
    """Return the SHA-256 of a file, or of the weights in a folder in timm's hub format."""
    with (path / HUB_WEIGHTS if path.is_dir() else path).open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
