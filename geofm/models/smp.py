"""Register the models as encoders of segmentation-models-pytorch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.encoders import encoders
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from geofm.models.checkpoints.files import CheckpointError
from geofm.models.multisensor import MultiSensorViT
from geofm.models.registry import MODEL_NAMES
from geofm.sensors import BandError


class SimpleFeaturePyramid(nn.Module):
    """Simple feature pyramid on the last map of a plain ViT (ViTDet; Li et al., 2022).

    With patches of 16 px, two transposed convolutions produce stride 4, one produces stride 8, and
    max pooling produces stride 32. A 1 x 1 and a 3 x 3 convolution follow. Each level starts from
    the ViT's map. LayerNorm follows each convolution, as in ViTDet.

    A patch size that is not a power of two is treated as the nearest power of two. Each map is then
    resized to its stride by antialiased bilinear interpolation. For example, with patches of 14 px
    and images of 224 px, maps of 64, 32, 16 and 8 px become 56, 28, 14 and 7 px.

    Args:
        embed_dim: Width of the ViT.
        patch_size: Side of its patches in pixels.
        strides: Pixels of the image per pixel of each map, powers of two.
        width: Channels of each map.
    """

    def __init__(
        self,
        embed_dim: int,
        patch_size: int,
        strides: Sequence[int] = (4, 8, 16, 32),
        width: int = 256,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.width = width
        octaves = round(math.log2(patch_size))
        self.levels = nn.ModuleList(
            _Level(embed_dim, width, octaves - round(math.log2(stride))) for stride in strides
        )

    def forward(self, x: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """Compute the maps.

        Args:
            x: Map of the ViT, of shape (B, D, H/p, W/p).
            size: Height H and width W of the image, multiples of all strides.

        Returns:
            A map of shape (B, width, H/s, W/s) for each stride s.
        """
        return [
            level(x, (size[0] // stride, size[1] // stride))
            for level, stride in zip(self.levels, self.strides, strict=True)
        ]


class _Level(nn.Module):
    """Level of the pyramid: the ViT's map scaled by 2 to the power of *octaves*."""

    def __init__(self, dim: int, width: int, octaves: int) -> None:
        super().__init__()
        self.scale = nn.Sequential()
        for i in range(octaves):
            if i:
                self.scale.extend([LayerNorm2d(dim), nn.GELU()])
            self.scale.append(nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2))
            dim //= 2
        if octaves < 0:
            self.scale.append(nn.MaxPool2d(2**-octaves))
        self.output = nn.Sequential(
            nn.Conv2d(dim, width, kernel_size=1, bias=False),
            LayerNorm2d(width),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(width),
        )

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.scale(x)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode='bilinear', antialias=True)
        output: Tensor = self.output(x)
        return output


#: Strides of the feature maps of an encoder with depth 5.
_STRIDES = (2, 4, 8, 16, 32)


class PyramidEncoder(nn.Module):
    """Encoder of segmentation-models-pytorch: a ViT with a simple feature pyramid.

    ``Unet``, ``UPerNet``, ``Segformer``, ``DeepLabV3Plus`` and others build it by the name of the
    ViT. ``DPT`` uses the plain ViT instead, by its name with the prefix ``tu-``.

    Image sides must be multiples of the patch size and of the output stride: of 32 for patches of
    16 px, of 224 for patches of 14 px. Nothing is padded or resized.

    Args:
        model: Name of a model of :data:`geofm.models.MODEL_NAMES`.
        depth: Number of feature maps in addition to the image, 1 to 5. The first map, of stride 2,
            has no channels, because a ViT has no features of that resolution.
        output_stride: Largest stride: 8, 16 or 32. DeepLabV3+ uses 8 or 16.
        model_args: Further arguments of the model: ``bands``, ``patch_size``, ``depth`` ...

    Raises:
        ValueError: If *depth* or *output_stride* is not one of these.
    """

    model: MultiSensorViT
    pyramid: SimpleFeaturePyramid

    def __init__(
        self,
        model: str,
        depth: int = 5,
        output_stride: int = 32,
        model_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= depth <= len(_STRIDES):
            raise ValueError(f'depth must be 1 to {len(_STRIDES)}, not {depth}')
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride must be 8, 16 or 32, not {output_stride}')
        self.name = model
        self.strides = tuple(min(stride, output_stride) for stride in _STRIDES[:depth])
        self._model_args = dict(model_args or {})

    @property
    def output_stride(self) -> int:
        """Largest stride of the feature maps."""
        return self.strides[-1]

    @property
    def out_channels(self) -> list[int]:
        """Number of channels of the image and of each feature map."""
        return [self.model.in_chans, 0, *[self.pyramid.width] * len(self.pyramid.strides)]

    def set_in_channels(self, in_channels: int, pretrained: bool = False) -> None:
        """Build the ViT. segmentation-models-pytorch sets the number of channels here.

        Args:
            in_channels: Number of channels: of all sensors, of one sensor, or of the ``bands`` that
                the encoder was registered with.
            pretrained: Not used; accepted for segmentation-models-pytorch.

        Raises:
            BandError: If the number does not match the bands that the encoder was registered with,
                or is too large.
            TypeError: If the model is not a geofm model.
        """
        try:
            model = timm.create_model(
                self.name, in_chans=in_channels, num_classes=0, **self._model_args
            )
        except BandError as error:
            raise BandError(f'{error} (geofm.models.register_encoder)') from error
        if not isinstance(model, MultiSensorViT):
            raise TypeError(f"'{self.name}' is not a geofm model; see geofm.models.MODEL_NAMES")
        self.model = model
        self._build_pyramid()

    def _build_pyramid(self) -> None:
        self._shape = (self.model.embed_dim, self.model.patch_size)
        parameter = next(self.model.parameters())
        with torch.device(parameter.device):
            pyramid = SimpleFeaturePyramid(*self._shape, self.strides[1:])
        self.pyramid = pyramid.to(parameter.dtype)

    def _follow_model(self) -> None:
        """Rebuild the pyramid if the loaded weights have changed the ViT's architecture."""
        if (self.model.embed_dim, self.model.patch_size) != self._shape:
            self._build_pyramid()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *args: Any
    ) -> None:
        # Adapt the ViT and the pyramid before the weights of either are loaded.
        self.model.prepare_for(state_dict, f'{prefix}model.')
        self._follow_model()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)

    def make_dilated(self, output_stride: int) -> None:
        """Do nothing: the pyramid was built for the stride.

        Args:
            output_stride: Not used; accepted for segmentation-models-pytorch.
        """

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the feature maps.

        Args:
            x: Normalised images of shape (B, C, H, W), with channels as in ``model.bands``.

        Returns:
            The images, and a map of shape (B, C', H/s, W/s) for each stride s; C' is 0 at stride 2.

        Raises:
            ValueError: If H or W is not a multiple of patch size and output stride.
        """
        height, width = x.shape[-2:]
        step = math.lcm(self.model.patch_size, self.output_stride)
        if height % step or width % step:
            raise ValueError(
                f'images of {height} x {width} px: with patches of {self.model.patch_size} px and '
                f'maps to stride {self.output_stride}, both sides must be multiples of {step}'
            )
        (last,) = self.model.forward_intermediates(x, indices=1, intermediates_only=True)
        no_channels = x.new_empty(x.shape[0], 0, height // 2, width // 2)
        return [x, no_channels, *self.pyramid(last, (height, width))]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the parameters of the ViT, without those of the pyramid.

        TorchGeo's ``freeze_backbone`` and ``freeze_encoder`` of segmentation-models-pytorch freeze
        exactly these parameters, and offer no other way to exclude some. The pyramid is never
        pretrained, so it must be trained even if the backbone is frozen. On images of random
        squares, Segformer on a frozen ViT reached an IoU of 0.56 and 0.57 after 60 steps (two
        seeds), and 0.35 and 0.48 with the pyramid frozen at random weights, too.
        :meth:`named_parameters`, and the parameters of any module around the encoder, include the
        pyramid.

        Args:
            recurse: As in PyTorch.

        Yields:
            The parameters.
        """
        if recurse:
            yield from self.model.parameters()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights of the whole encoder, or of a pretrained ViT alone.

        Weights of a ViT alone are what TorchGeo extracts from a checkpoint of
        :class:`geofm.tasks.DINOv2` or ``Classification`` (without its head), or from a file that
        ``geofm export`` wrote. Their keys are those of the ViT, with or without the prefix
        ``model.``. They must be complete. The pyramid then keeps its weights.

        Args:
            state_dict: Tensors by name.
            strict: As in PyTorch, for the whole encoder. A ViT alone is always loaded strictly.
            assign: As in PyTorch.

        Returns:
            Missing and unexpected keys, as in PyTorch.

        Raises:
            CheckpointError: If the weights of a ViT do not fit.
        """
        if any(key.startswith('pyramid.') for key in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        bare = {key.removeprefix('model.'): value for key, value in state_dict.items()}
        weights = {key: value for key, value in bare.items() if not key.startswith('head.')}
        try:
            result = self.model.load_state_dict(weights, assign=assign)
            self._follow_model()
            return result
        except (RuntimeError, CheckpointError) as error:
            raise CheckpointError(f"the weights do not fit '{self.name}': {error}") from error


def register_encoder(name: str, model: str, **model_args: Any) -> None:
    """Register a model with further arguments as an encoder of segmentation-models-pytorch.

    The models of :data:`geofm.models.MODEL_NAMES` are registered under their names when
    ``geofm.models`` is imported. Variants with other bands, patch size or depth need a name of
    their own.

    Args:
        name: Name of the encoder, for ``encoder_name`` or TorchGeo's ``backbone``.
        model: Name of a model of :data:`geofm.models.MODEL_NAMES`.
        model_args: Further arguments of the model.

    Raises:
        ValueError: If the name belongs to another encoder, or starts with ``tu-``, the prefix for
            models of timm.
    """
    taken = encoders.get(name, {}).get('encoder', PyramidEncoder) is not PyramidEncoder
    if taken or name in MODEL_NAMES or name.startswith('tu-'):
        raise ValueError(f"an encoder cannot be called '{name}': the name is taken or reserved")
    encoders[name] = _entry(model, model_args)


def _entry(model: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the registry entry of an encoder in segmentation-models-pytorch."""
    params = {'model': model, 'model_args': model_args}
    return {'encoder': PyramidEncoder, 'pretrained_settings': {}, 'params': params}


encoders.update({name: _entry(name, {}) for name in MODEL_NAMES})
