"""ViTs of timm with named channels, and loading of models from any checkpoint."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from geofm.models.architecture import KEY, Architecture
from geofm.models.attention import TokensAndAttention, block_index, observe_blocks
from geofm.models.checkpoints.backbones import build_backbone, check_fit
from geofm.models.checkpoints.files import CheckpointError
from geofm.models.checkpoints.model_file import ModelFile, read_model
from geofm.models.multisensor import MultiSensorViT
from geofm.models.registry import MODEL_NAMES
from geofm.models.shapes import shapes_only
from geofm.printing import one_line
from geofm.sensors import BandError, check_bands, check_channels, sensor_channels
from geofm.transforms import InputStatistics


class TimmViT(nn.Module):
    """ViT of timm with named channels, with the interface of geofm models for maps.

    Tokens and attention are those of the ViT. Dates and missing sensors are not supported.

    Args:
        vit: A ``VisionTransformer``, ``Eva`` or another timm model with the same structure: a patch
            embedding, then blocks with one attention each.
        bands: Names of its channels, in their order.

    Attributes:
        bands: Names of the channels.
        sensors: Keys of the sensors of these channels.
        patch_size: Side of a patch in pixels.
        depth: Number of blocks.
        num_prefix_tokens: Number of CLS and register tokens before the patches.
        embed_dim: Width of the tokens.
        statistics: Statistics of the input in training. None: the built-in statistics.

    Raises:
        ValueError: If *vit* is not such a ViT, or its patches are not square.
        BandError: If a band is unknown or given twice, or the number of bands is not that of the
            channels.
    """

    statistics: InputStatistics | None = None

    def __init__(self, vit: nn.Module, bands: Sequence[str]) -> None:
        super().__init__()
        inner: Any = vit
        wanted = ('patch_embed', 'blocks', 'forward_features', 'num_prefix_tokens')
        if missing := [name for name in wanted if not hasattr(vit, name)]:
            raise ValueError(f'{type(vit).__name__} is not a ViT of timm: it has no {missing}')
        height, width = inner.patch_embed.patch_size
        if height != width:
            raise ValueError(f'patches of {height} x {width} px: maps need square patches')
        channels = inner.patch_embed.proj.in_channels
        self.bands = check_bands(bands)
        if len(self.bands) != channels:
            raise BandError(
                f'the model has {channels} channels, but {len(self.bands)} bands are named: '
                f'{list(self.bands)}'
            )
        self.vit = vit
        self.sensors = tuple(sensor_channels(self.bands))
        self.patch_size: int = height
        self.depth = len(inner.blocks)
        self.num_prefix_tokens: int = inner.num_prefix_tokens
        self.embed_dim: int = inner.num_features
        self.pretrained_cfg = getattr(vit, 'pretrained_cfg', None)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output of the ViT.

        Args:
            x: Normalised images of shape (B, C, H, W), channels as in :attr:`bands`.

        Returns:
            The output of the ViT.

        Raises:
            BandError: If the images do not have one channel per band.
        """
        check_channels(x, self.bands)
        output: Tensor = self.vit(x)
        return output

    def observe(
        self,
        x: Tensor,
        dates: Tensor | None = None,
        present: Tensor | None = None,
        *,
        block: int | None = None,
        query: Tensor | None = None,
        rollout: bool = False,
    ) -> TokensAndAttention:
        """Compute tokens and attention of a batch in one forward pass.

        Args:
            x: Normalised images of shape (B, C, H, W), channels as in :attr:`bands`.
            dates: Not used.
            present: Whether each of :attr:`sensors` is present, bool of shape (B, S). All must be
                present.
            block: Index of the block whose attention is returned; negative indices count from the
                end. None: no attention.
            query: Index of the query patch of each sample, int64 of shape (B,). None: CLS.
            rollout: Whether to return attention rollout from CLS.

        Returns:
            As from :meth:`geofm.models.MultiSensorViT.observe`. Attention has one source, with the
            key of the sensor, or 'vit' for several sensors.

        Raises:
            BandError: If the images do not have one channel per band.
            IndexError: If there is no such block.
            ValueError: If a sensor is missing, the image size is not supported, or attention of CLS
                is requested and the model has no CLS token.
        """
        check_channels(x, self.bands)
        vit: Any = self.vit
        if present is not None and not present.all():
            raise ValueError('the model needs all of its sensors: it has no missing-sensor tokens')
        if (rollout or (block is not None and query is None)) and not has_cls_token(vit):
            raise ValueError(
                'the model has no CLS token, and so no attention or rollout from it: use products '
                'of patch tokens instead: pca, segments or embedding'
            )
        size = tuple(x.shape[-2:])
        stored = tuple(vit.patch_embed.img_size or size)
        if size != stored and not getattr(vit, 'dynamic_img_size', False):
            raise ValueError(
                f'the model needs {stored[0]} x {stored[1]} px, not {size[0]} x {size[1]}: set the '
                'window to that size, or create the model with dynamic_img_size=True'
            )
        index = None if block is None else block_index(block, self.depth)
        queries = None if query is None else self.num_prefix_tokens + query
        with observe_blocks(list(vit.blocks), index, queries, rollout) as seen:
            tokens: Tensor = vit.forward_features(x)
        source = self.sensors[0] if len(self.sensors) == 1 else 'vit'
        grid = (size[0] // self.patch_size, size[1] // self.patch_size)

        def on_patches(weights: Tensor) -> Tensor:
            return weights[..., self.num_prefix_tokens :].unflatten(-1, grid)

        return TokensAndAttention(
            tokens,
            {} if seen.rows is None else {source: on_patches(seen.rows)},
            {} if seen.product is None else {source: on_patches(seen.product[:, 0])},
        )


def has_cls_token(model: nn.Module) -> bool:
    """Return whether a model has a CLS token.

    Args:
        model: A ViT of timm, a :class:`TimmViT`, or a model of this package.

    Returns:
        True if the model has a CLS token.
    """
    inner = model.vit if isinstance(model, TimmViT) else model
    return getattr(inner, 'has_class_token', getattr(inner, 'cls_token', None) is not None)


def load_model(
    checkpoint: Path | ModelFile,
    model: str | None = None,
    bands: Sequence[str] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> MultiSensorViT | TimmViT:
    """Load a model for maps from any checkpoint.

    Args:
        checkpoint: Checkpoint of a pretraining task of geofm, or of TorchGeo's ``Classification``,
            ``SemanticSegmentation``, ``SimCLR``, ``MoCo`` or ``MAE`` with a geofm model or a ViT of
            timm; or, with *model*, a file of weights of that model, ``.pth`` or ``.safetensors``,
            in timm's format or as published by the authors (DINOv2, DINOv3).
        model: Name of a model for ``timm.create_model``.
        bands: Names of the model's channels. Required for a ViT of timm.
        model_args: Further arguments of that model.

    Returns:
        The model, in evaluation mode, without a head.

    Raises:
        CheckpointError: If the file cannot be read, is of another kind, or does not fit.
        BandError: If a band is unknown, or if bands are required and not given.
    """
    file = read_model(checkpoint)
    if model is not None:
        return _create(model, file.weights, file.path, bands, model_args, file.statistics)
    if file.pretrained is not None or file.task is None:
        return build_backbone(file.require_pretrained())
    found = file.task
    return _create(found.model, found.weights, file.path, bands, found.model_args, found.statistics)


def _create(
    name: str,
    weights: dict[str, Tensor],
    checkpoint: Path,
    bands: Sequence[str] | None,
    model_args: Mapping[str, Any] | None,
    statistics: InputStatistics | None,
) -> MultiSensorViT | TimmViT:
    """Build a model by its name, and load weights except those of a head."""
    weights = {key: value for key, value in weights.items() if not key.startswith('head.')}
    ours = name in MODEL_NAMES
    if ours and (said := weights.pop(KEY, None)) is not None:
        architecture = Architecture.from_tensor(said)
        model_args = {**architecture.model_args, **(model_args or {})}
        bands = architecture.bands if bands is None else bands
    if bands is None and not ours:
        raise BandError(
            f"the bands of the channels of '{name}' are unknown: name them with --bands"
        )
    channels = _channels(weights) if bands is None else len(check_bands(bands))
    args = {'num_classes': 0, 'in_chans': channels, **(model_args or {})}
    if ours:
        args['bands'] = bands
    try:
        # First on the meta device: a damaged file may describe a model too large for any machine.
        with shapes_only():
            shapes = _build(name, args)
        own = shapes.state_dict()
        if not ours and weights.keys() != own.keys():
            weights = _timm_layout(weights, shapes)
        check_fit(own, weights, checkpoint, f"'{name}'")
        model = _build(name, args)
        model.load_state_dict(weights)
    except (CheckpointError, BandError):
        raise
    except Exception as error:
        # Parts of the model may raise anything for arguments that contradict each other.
        raise CheckpointError(
            f"{checkpoint}: cannot be loaded as '{name}': {one_line(error)}"
        ) from error
    model.eval()
    found = model if isinstance(model, MultiSensorViT) else TimmViT(model, bands or ()).eval()
    found.statistics = statistics
    return found


def _build(name: str, args: Mapping[str, Any]) -> Any:
    """Build a model, with support for images of any size if possible."""
    if name in MODEL_NAMES:
        return timm.create_model(name, **args)
    try:
        return timm.create_model(name, **{'dynamic_img_size': True, **args})
    except TypeError:
        # Models with relative positions support one size only.
        return timm.create_model(name, **args)


def _timm_layout(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert published weights, e.g. of DINOv2 and DINOv3, to timm's names."""
    convert = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    if convert is None:
        return weights
    # timm prints an error for biases that a model does not have.
    with redirect_stdout(StringIO()):
        return dict(convert(weights, model))


def _channels(weights: dict[str, Tensor]) -> int:
    """Return the number of input channels of a geofm model, over all patch embeddings."""
    name = 'patch_embed.proj.weight'
    return sum(v.shape[1] for k, v in weights.items() if k.endswith(name) and v.ndim == 4)
