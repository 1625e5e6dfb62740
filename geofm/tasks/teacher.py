"""A frozen, pretrained model as the teacher of a student with other sensors and another size."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from geofm.losses import FeatureLoss, resize_tokens
from geofm.models import MODEL_NAMES, MultiSensorViT
from geofm.models.checkpoints.files import HUB_WEIGHTS, CheckpointError
from geofm.models.dates import NO_DATE
from geofm.models.timm_vit import TimmViT, has_cls_token, load_model
from geofm.sensors import RGB_BANDS, BandError, band_indices, band_statistics, sensor_of
from geofm.transforms import Crops, Normalize
from geofm.transforms.picture import PICTURE_WHITE, Picture, Standardize
from geofm.transforms.statistics import NO_STATISTICS, InputStatistics


@dataclass
class Teacher:
    """A pretrained model whose features a student learns.

    Attributes:
        model: A checkpoint that `geofm fit` wrote, or what `geofm export` made of it; or, with
            *weights*, the name of a geofm or timm model, such as `vit_small_patch14_dinov2` or
            `vit_small_patch16_dinov3`.
        weights: File of the weights of a model that is named, by timm's names or as DINOv2 and
            DINOv3 are published. Nothing is downloaded.
        bands: Bands of the model's channels, in their order. By default a checkpoint's own, and
            red, green and blue of Sentinel-2 for models of timm. The student's bands must include
            them.
        image_size: Side in pixels to which the student's global crops are resized for the teacher.
            By default it has as many patches of a crop as the student.
        mean: Mean of each band in its unit (S2: DN) that the model was trained with. By default
            a checkpoint's own; a model of timm sees a picture.
        std: Standard deviation of each band likewise.
        white: DN (reflectance x 10,000) that is 1 in such a picture, before the mean and standard
            deviation of timm's model are applied: 10000 for reflectance itself.
        model_args: Further arguments of a model that is named.
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
    """A pretrained model that sees the student's crops by band name.

    The model itself is no submodule: it is neither saved, trained, wrapped nor put into training
    mode with the task; it only moves with it.

    Attributes:
        network: The model.
        bands: Its bands.
        description: What it is, for checkpoints: model, bands, name and SHA-256 of the file.
    """

    network: MultiSensorViT | TimmViT
    mean: Tensor
    std: Tensor

    def __init__(self, teacher: Teacher, bands: tuple[str, ...]) -> None:
        """Load the model.

        Args:
            teacher: Which model.
            bands: Bands of the student, in the order of its channels.

        Raises:
            CheckpointError: If the file cannot be read or does not fit.
            BandError: If the student lacks a band of the model, or what normalises it is not known.
        """
        super().__init__()
        path = Path(teacher.weights or teacher.model)
        if not path.exists():
            what = 'no such file' + ('' if teacher.weights else ', and without weights no model')
            raise CheckpointError(f'teacher: {path}: {what}. Give a file of weights that is there')
        named = None if teacher.weights is None else teacher.model
        given = teacher.bands
        if named is not None and named not in MODEL_NAMES and given is None:
            given = list(RGB_BANDS)
        # Random weights of the student are not to depend on those that the file replaces.
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
        """Set what the student's input was normalised with; at first, the sensors' statistics.

        Args:
            mean: Mean of each band of the student in raw units, shape (C,).
            std: Standard deviation likewise.
        """
        self.mean = mean[self._channels].view(-1, 1, 1).to(self.mean)
        self.std = std[self._channels].view(-1, 1, 1).to(self.std)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the model, too."""
        self.network._apply(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, images: Tensor, dates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of images.

        Args:
            images: Images as the student sees them, normalised, of shape (N, C, H, W).
            dates: Dates of the bands' sensors, int64 of shape (N, S), for a model that knows them.

        Returns:
            CLS features (N, D), of a model without CLS the mean of its patches; and patch
            features (N, h x w, D).
        """
        raw = images[:, self._channels] * self.std + self.mean
        tokens = self.network.observe(self.normalize(raw), dates).tokens
        patches = tokens[:, self.network.num_prefix_tokens :]
        return tokens[:, 0] if self.has_cls else patches.mean(dim=1), patches


class FeatureDistillation(nn.Module):
    """Losses of a student's features to those of a frozen teacher.

    As in AM-RADIO (Ranzinger et al., 2024, https://arxiv.org/abs/2312.06709), a linear projection
    of the student's CLS and one of its patch features predict the teacher's, whose patches are
    resized to the student's grid; the losses are those of UNIC, see
    :class:`geofm.losses.FeatureLoss`. The teacher sees the student's global crops whole, without
    photometry.

    Attributes:
        teacher: The frozen teacher.
        image_size: Side in pixels of the crops that it sees.
        weights: Factor of each loss by name.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: MultiSensorViT,
        grid: tuple[int, int],
        image_size: int | None = None,
    ) -> None:
        """Load the teacher, and build what projects the student's features.

        Args:
            teacher: Which model.
            student: The student's backbone.
            grid: Patches of a global crop of the student, down and across.
            image_size: Side in pixels that other losses need; None: any.

        Raises:
            CheckpointError: If the file cannot be read or does not fit.
            BandError: If the student lacks a band of the teacher, or what normalises it is not
                known.
            ValueError: If the teacher cannot take images of that size.
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
        """Losses of the global crops of B images.

        Args:
            crops: Crops with anchors of :attr:`image_size`.
            cls: CLS features of the student, of shape (2B, D).
            patches: Its patch features, of shape (2B, N, D).
            present: Whether each sensor of the student is present, bool of shape (2B, S): crops
                that lack one of the teacher's do not count. None: all are.
            learn: Whether the averages of the teacher's features learn from these.

        Returns:
            Losses by name.
        """
        assert crops.anchors is not None
        dates = None
        if crops.global_dates is not None and self._columns is not None:
            # A column more, without dates, for sensors that are not the student's.
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
    """From raw values to what the model was trained on."""
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
            f'teacher: how {teacher.model} normalises the bands {bands} is not known: give mean '
            'and std of each in its unit'
        )
    return nn.Sequential(Picture(teacher.white), Standardize(*own))


class _Image(nn.Module):
    """A normalisation of batches, for images alone."""

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
    """Side of the images that the teacher sees."""
    patch = network.patch_size
    fixed = None
    vit: Any = getattr(network, 'vit', None)
    if vit is not None and not getattr(vit, 'dynamic_img_size', False):
        fixed = int(vit.patch_embed.img_size[0])
    size = teacher.image_size or wanted or fixed or grid[0] * patch
    if wanted is not None and size != wanted:
        raise ValueError(f'teacher: image_size is {size}, but gram_size {wanted}: give the same')
    if size <= 0 or size % patch:
        raise ValueError(f'teacher: image_size {size} must be a positive multiple of {patch}')
    if fixed is not None and size != fixed:
        raise ValueError(f'teacher: {teacher.model} takes images of {fixed} px, not {size}')
    return size


def _date_columns(network: MultiSensorViT | TimmViT, student: MultiSensorViT) -> list[int] | None:
    """Columns of the student's dates that the teacher wants, -1 for none; None: it wants none."""
    if not isinstance(network, MultiSensorViT):
        return None
    own = list(student.date_sensors)
    return [own.index(key) if key in own else -1 for key in network.date_sensors]


def _hash(path: Path) -> str:
    """SHA-256 of a file, or of the weights in a folder of timm's hub format."""
    with (path / HUB_WEIGHTS if path.is_dir() else path).open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
