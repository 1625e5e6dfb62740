"""Our ViTs as encoders of segmentation-models-pytorch, under their own names."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from segmentation_models_pytorch.encoders import encoders
from torch import Tensor, nn

from geofm.models.checkpoints.files import CheckpointError
from geofm.models.multisensor import MultiSensorViT
from geofm.models.pyramid import SimpleFeaturePyramid
from geofm.models.registry import MODEL_NAMES
from geofm.sensors import BandError

#: Strides of an encoder of depth 5, after the image itself.
_STRIDES = (2, 4, 8, 16, 32)


class PyramidEncoder(nn.Module):
    """A ViT with a simple feature pyramid, as segmentation-models-pytorch wants an encoder.

    ``Unet``, ``UPerNet``, ``Segformer``, ``DeepLabV3Plus`` and others build it by the name of the
    ViT. ``DPT`` takes the plain ViT instead, by its name with ``tu-`` before it.

    The sides of an image must be multiples of the patch size and of the output stride: of 32 for
    patches of 16 px, of 224 for patches of 14 px. Nothing is padded or resized.

    Args:
        model: Name of a model of :data:`geofm.models.MODEL_NAMES`.
        depth: Number of maps after the image itself, 1 to 5. The first, of stride 2, has no
            channels: patches of 16 px know nothing so fine.
        output_stride: Coarsest stride: 32, or 16 or 8, which DeepLabV3+ asks for.
        model_args: Further arguments of the model: ``bands``, ``patch_size``, ``depth`` ...

    Raises:
        ValueError: If *depth* or *output_stride* is none of these.
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
        """Coarsest stride."""
        return self.strides[-1]

    @property
    def out_channels(self) -> list[int]:
        """Channels of the image and of each map."""
        return [self.model.in_chans, 0, *[self.pyramid.width] * len(self.pyramid.strides)]

    def set_in_channels(self, in_channels: int, pretrained: bool = False) -> None:
        """Build the ViT: segmentation-models-pytorch says so late how many channels there are.

        Args:
            in_channels: Number of channels: all of both sensors, those of one, or as many as the
                ``bands`` that the encoder was registered with.
            pretrained: Accepted for segmentation-models-pytorch.

        Raises:
            BandError: If the number is not that of the bands that the encoder was registered with,
                or too large.
            TypeError: If the model is none of this package.
        """
        try:
            model = timm.create_model(
                self.name, in_chans=in_channels, num_classes=0, **self._model_args
            )
        except BandError as error:
            raise BandError(f'{error} (geofm.models.register_encoder)') from error
        if not isinstance(model, MultiSensorViT):
            raise TypeError(f"'{self.name}' is no geofm model; see geofm.models.MODEL_NAMES")
        self.model = model
        self._build_pyramid()

    def _build_pyramid(self) -> None:
        self._shape = (self.model.embed_dim, self.model.patch_size)
        parameter = next(self.model.parameters())
        with torch.device(parameter.device):
            pyramid = SimpleFeaturePyramid(*self._shape, self.strides[1:])
        self.pyramid = pyramid.to(parameter.dtype)

    def _follow_model(self) -> None:
        """Build the pyramid anew if the ViT became another one with the weights it was given."""
        if (self.model.embed_dim, self.model.patch_size) != self._shape:
            self._build_pyramid()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *args: Any
    ) -> None:
        # The pyramid's weights come after the ViT's, and must find a pyramid that they fit.
        self.model.prepare_for(state_dict, f'{prefix}model.')
        self._follow_model()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)

    def make_dilated(self, output_stride: int) -> None:
        """Nothing: the pyramid was built for the stride.

        Args:
            output_stride: Accepted for segmentation-models-pytorch.
        """

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of every stride.

        Args:
            x: Normalised images of shape (B, C, H, W), channels as in ``model.bands``.

        Returns:
            The images, and a map of shape (B, C', H/s, W/s) for each stride s; C' is 0 at stride 2.

        Raises:
            ValueError: If H or W does not fit.
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
        """Parameters of the ViT, without those of the pyramid.

        These are what others freeze when told to freeze the backbone: TorchGeo's
        ``freeze_backbone``, ``freeze_encoder`` of segmentation-models-pytorch. A pyramid is never
        pretrained, and frozen at random weights it would spoil every map. The parameters of the
        pyramid are among :meth:`named_parameters` and those of any module around the encoder.

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
        """Load all of the encoder, or the weights of a pretrained ViT alone.

        The latter are what TorchGeo reads out of a checkpoint of :class:`geofm.tasks.DINOv2`, of
        ``Classification``, whose head is left out, or of a file that ``geofm export`` wrote: the
        keys of the ViT, with ``model.`` before them or without. Every tensor of the ViT must be
        there; the pyramid keeps its weights.

        Args:
            state_dict: Tensors by name.
            strict: As in PyTorch, for all of the encoder; a ViT alone is always loaded strictly.
            assign: As in PyTorch.

        Returns:
            The keys missing and unexpected, as PyTorch does.

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
    """Make a ViT an encoder of segmentation-models-pytorch, under a name of its own.

    The models of :data:`geofm.models.MODEL_NAMES` are registered under their names when
    ``geofm.models`` is imported. What differs from them needs a name: other bands, another patch
    size, another depth.

    Args:
        name: Name to be given as ``encoder_name``, or as TorchGeo's ``backbone``.
        model: Name of a model of :data:`geofm.models.MODEL_NAMES`.
        model_args: Further arguments of the model.

    Raises:
        ValueError: If the name belongs to another encoder, or starts with ``tu-``, which means a
            model of timm.
    """
    taken = encoders.get(name, {}).get('encoder', PyramidEncoder) is not PyramidEncoder
    if taken or name in MODEL_NAMES or name.startswith('tu-'):
        raise ValueError(f"an encoder of ours cannot be called '{name}': that means another one")
    encoders[name] = _entry(model, model_args)


def _entry(model: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """What segmentation-models-pytorch keeps of an encoder."""
    params = {'model': model, 'model_args': model_args}
    return {'encoder': PyramidEncoder, 'pretrained_settings': {}, 'params': params}


encoders.update({name: _entry(name, {}) for name in MODEL_NAMES})
