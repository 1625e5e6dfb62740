"""Encoders of segmentation-models-pytorch as backbones of transformers, and Mask2Former on them.

Needs the extra ``geofm[mask2former]``: import this module only where it is used.
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

#: Maps of an encoder of depth 5, but for the image itself and the finest.
_STAGES = ('stride4', 'stride8', 'stride16', 'stride32')


class SmpBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """Which encoder, and how many channels it sees.

    Args:
        encoder: Name of an encoder of segmentation-models-pytorch, one of ours among them.
        in_channels: Number of input channels.
        kwargs: Further arguments of a configuration.
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
    """An encoder of segmentation-models-pytorch that transformers builds by its configuration.

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
        """Leave the weights as the encoder made them."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BackboneOutput:
        """Maps of strides 4 to 32.

        Args:
            pixel_values: Normalised images of shape (B, C, H, W).

        Returns:
            The maps.
        """
        return BackboneOutput(feature_maps=tuple(self.encoder(pixel_values)[2:]))


AutoConfig.register(SmpBackboneConfig.model_type, SmpBackboneConfig)
AutoBackbone.register(SmpBackboneConfig, SmpBackbone)


class _Config(Mask2FormerConfig):
    """That of Mask2Former, which warns of any backbone but Swin."""

    backbones_supported = [SmpBackboneConfig.model_type]  # noqa: RUF012


def build_mask2former(
    encoder: str, in_channels: int, **config_args: Any
) -> tuple[Mask2FormerForUniversalSegmentation, nn.Module]:
    """Build Mask2Former on an encoder, all weights random.

    Args:
        encoder: Name of an encoder of segmentation-models-pytorch, one of ours among them.
        in_channels: Number of input channels.
        config_args: Further arguments of ``Mask2FormerConfig``.

    Returns:
        The model, and the encoder in it.
    """
    backbone = SmpBackboneConfig(encoder, in_channels)
    model = Mask2FormerForUniversalSegmentation(_Config(backbone_config=backbone, **config_args))
    return model, model.model.pixel_level_module.encoder.encoder
