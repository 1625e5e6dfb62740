"""Encoders of segmentation-models-pytorch as backbones in transformers, for Mask2Former.

This module needs the extra ``geofm[mask2former]``. Import it only where it is used.
"""

from typing import Any

from segmentation_models_pytorch.encoders import get_encoder
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

#: Feature maps of an encoder of depth 5 that Mask2Former uses.
_STAGES = ('stride4', 'stride8', 'stride16', 'stride32')


class SmpBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of :class:`SmpBackbone`.

    Args:
        encoder: Name of an encoder of segmentation-models-pytorch, e.g. a geofm model.
        in_channels: Number of input channels.
        kwargs: Further arguments of the base class.
    """

    model_type = 'smp'

    encoder: str = ''
    in_channels: int = 3
    stage_names: list[str] | None = None

    def __init__(self, encoder: str = '', in_channels: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder = encoder
        self.in_channels = in_channels
        self.stage_names = list(_STAGES)
        self.set_output_features_output_indices(list(_STAGES), None)


class SmpBackbone(BackboneMixin, PreTrainedModel):
    """Encoder of segmentation-models-pytorch as a backbone of transformers.

    Args:
        config: The configuration.
    """

    config_class = SmpBackboneConfig

    def __init__(self, config: SmpBackboneConfig) -> None:
        super().__init__(config)
        self.encoder = get_encoder(config.encoder, config.in_channels, depth=5)
        self.num_features = list(self.encoder.out_channels[2:])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the weights that the encoder has been initialized with."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BackboneOutput:
        """Compute feature maps of strides 4 to 32.

        Args:
            pixel_values: Normalised images of shape (B, C, H, W).

        Returns:
            The feature maps.
        """
        return BackboneOutput(feature_maps=tuple(self.encoder(pixel_values)[2:]))


AutoConfig.register(SmpBackboneConfig.model_type, SmpBackboneConfig)
AutoBackbone.register(SmpBackboneConfig, SmpBackbone)


class _Config(Mask2FormerConfig):
    """Configuration of Mask2Former without the warning for backbones other than Swin."""

    backbones_supported = [SmpBackboneConfig.model_type]  # noqa: RUF012


def build_mask2former(
    encoder: str, in_channels: int, **config_args: Any
) -> tuple[Mask2FormerForUniversalSegmentation, nn.Module]:
    """Build Mask2Former with an encoder and random weights.

    Args:
        encoder: Name of an encoder of segmentation-models-pytorch, e.g. a geofm model.
        in_channels: Number of input channels.
        config_args: Further arguments of ``Mask2FormerConfig``.

    Returns:
        The model and its encoder.
    """
    backbone = SmpBackboneConfig(encoder, in_channels)
    model = Mask2FormerForUniversalSegmentation(_Config(backbone_config=backbone, **config_args))
    return model, model.model.pixel_level_module.encoder.encoder
