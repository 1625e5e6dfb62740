"""Building any backbone by name, to compute features with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from torchgeo.models import RCF

from geofm.evaluation.backbones.adapter import Adapter, Missing, Transformed
from geofm.evaluation.backbones.encoders import (
    Encoder,
    PatchWordsEncoder,
    PooledEncoder,
    StatisticsEncoder,
    ViTEncoder,
)
from geofm.evaluation.backbones.ours import OursBuilder, is_ours
from geofm.evaluation.backbones.torchgeo_weights import TorchGeoBuilder, is_torchgeo, load_weights
from geofm.models import MODEL_NAMES, CheckpointError, MultiSensorViT, PatchWords
from geofm.models.checkpoints import ModelFile, read_model
from geofm.sensors import RGB_BANDS, BandError
from geofm.transforms import NO_STATISTICS, PICTURE_WHITE, InputStatistics, Picture, Standardize

#: Name of the baseline of TorchGeo's random convolutional features.
RCF_NAME = 'rcf'

#: Name of the baseline of bags of patch words.
PATCH_WORDS_NAME = 'patch_words'

#: Name of the baseline of band statistics in tables.
STATISTICS = 'band mean and std'


@dataclass
class BackboneConfig:
    """A backbone to evaluate.

    Attributes:
        model: A checkpoint of `geofm fit`, with a pretraining task of geofm or TorchGeo's
            `Classification`, `SimCLR`, `MoCo` or `MAE`; the name of a geofm or timm model; the name
            of TorchGeo weights such as `ViTSmall16_Weights.SENTINEL2_ALL_DINO`; or a baseline,
            `rcf` or `patch_words`.
        name: Name in tables.
        weights: File of weights for *model*. Default: pretrained weights are downloaded.
        pretrained: Whether a timm model gets its pretrained weights.
        bands: Bands of the model's channels, in order. Default: the bands of the checkpoint or of
            TorchGeo's weights; red, green and blue for timm models; all bands of the data for
            models with random weights.
        image_size: Side in pixels to which images are resized. Default: images are not resized, or
            to the next multiple of the patch size.
        missing_bands: Values for a band that the data lack: its mean or zero. Default: a missing
            band is an error. A fused model needs no filling for a missing sensor.
        mean: Mean of bands in dB and DN that the model was trained with, if it differs from that of
            geofm.
        std: Standard deviation of bands, likewise.
        model_args: Further arguments of the model.
    """

    model: str
    name: str | None = None
    weights: Path | None = None
    pretrained: bool = True
    bands: list[str] | None = None
    image_size: int | None = None
    missing_bands: Missing | None = None
    mean: dict[str, float] | None = None
    std: dict[str, float] | None = None
    model_args: dict[str, Any] | None = None


@dataclass
class Backbone:
    """A backbone with the preparation of its input.

    Attributes:
        name: Name in tables.
        encoder: Computes features of prepared batches.
        adapter: Prepares batches of the data.
        architecture: Description that is equal for models that differ only in their weights. None:
            the backbone has no weights.
        learned: Whether its weights are pretrained.
        model: The model; None if there is none to fine-tune.
        decoder_name: Name of the architecture for TorchGeo's segmentation tasks.
        lines: Notes for the report.
    """

    name: str
    encoder: Encoder
    adapter: Adapter
    architecture: str | None = None
    learned: bool = False
    model: nn.Module | None = None
    decoder_name: str | None = None
    lines: list[str] = field(default_factory=list)


class _Asked(NamedTuple):
    """Arguments of :func:`build_backbone`, and the weights of the backbone."""

    config: BackboneConfig
    weights: Path | ModelFile | None
    data_bands: Sequence[str]
    statistics: Mapping[str, tuple[float, float]]
    seed: int
    random: bool


def statistics_backbone(
    data_bands: Sequence[str], statistics: Mapping[str, tuple[float, float]]
) -> Backbone:
    """Return the baseline of band statistics.

    Args:
        data_bands: Bands of the data.
        statistics: Mean and standard deviation of each band, given by the user.

    Returns:
        The backbone.
    """
    adapter = Adapter(data_bands, data_bands, statistics=statistics)
    return Backbone(STATISTICS, StatisticsEncoder(), adapter)


def build_backbone(
    config: BackboneConfig,
    data_bands: Sequence[str],
    statistics: Mapping[str, tuple[float, float]],
    seed: int,
    random: bool = False,
) -> Backbone:
    """Build a backbone. The file of its weights is read once.

    Args:
        config: The backbone to build.
        data_bands: Bands of the data.
        statistics: Mean and standard deviation of each band, given by the user. They take
            precedence over those of the checkpoint.
        seed: Seed of random weights.
        random: Whether the weights are left random, as the baseline of the architecture.

    Returns:
        The backbone.

    Raises:
        BandError: If the data lack bands that the backbone needs.
        CheckpointError: If weights cannot be read or do not fit.
        ValueError: If there is no model of that name.
    """
    weights: Path | ModelFile | None = config.weights
    if config.model not in MODEL_NAMES and is_ours(config.model):
        weights = read_model(Path(config.model))
        config = _of_task(config, weights, statistics)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        asked = _Asked(config, weights, data_bands, statistics, seed, random)
        if config.model == RCF_NAME:
            return _rcf(asked)
        if config.model == PATCH_WORDS_NAME:
            return _patch_words(asked)
        if is_ours(config.model):
            return _ours(asked)
        return _torchgeo(asked) if is_torchgeo(config.model) else _timm(asked)


def _of_task(
    config: BackboneConfig, file: ModelFile, of_data: Mapping[str, tuple[float, float]]
) -> BackboneConfig:
    """Describe the model in a checkpoint of a TorchGeo task that has a model of timm."""
    found = file.task if file.pretrained is None else None
    if found is None or found.model in MODEL_NAMES:
        return config
    mean, std = config.mean, config.std
    if found.statistics is not None and not mean and not std:
        # Statistics given for the data take precedence, as for models of geofm.
        mean = {b: m for b, m in found.statistics.mean.items() if b not in of_data}
        std = {b: found.statistics.std[b] for b in mean}
    return replace(
        config,
        model=found.model,
        name=config.name or file.path.stem,
        pretrained=False,
        model_args={**found.model_args, **(config.model_args or {})},
        mean=mean,
        std=std,
    )


def _statistics(
    config: BackboneConfig,
    of_data: Mapping[str, tuple[float, float]],
    carried: InputStatistics | None = None,
) -> dict[str, tuple[float, float]]:
    """Return the mean and standard deviation by band.

    Statistics of the backbone's configuration take precedence over those of the data, and these
    over those of the checkpoint.
    """
    given = {*(config.mean or {}), *(config.std or {})}
    incomplete = given - (set(config.mean or {}) & set(config.std or {}))
    if incomplete:
        raise BandError(
            f'{config.model}: mean and std must have the same bands: {sorted(incomplete)} are in '
            'one only'
        )
    own = {b: (config.mean[b], config.std[b]) for b in given} if config.mean and config.std else {}
    trained = {} if carried is None else {b: (m, carried.std[b]) for b, m in carried.mean.items()}
    return {**trained, **of_data, **own}


def _statistics_lines(
    title: str, statistics: Mapping[str, tuple[float, float]], carried: InputStatistics | None
) -> list[str]:
    """Return notes on the normalisation of a checkpoint's input."""
    if carried is None:
        return []
    others = [b for b, m in carried.mean.items() if statistics[b] != (m, carried.std[b])]
    if others:
        return [
            f'{title}: {", ".join(others)} are normalised by the given statistics, not by those '
            'that its weights were trained with'
        ]
    if not carried.differs():
        return []
    return [f'{title}: normalised by the statistics that its weights were trained with']


def _rcf(asked: _Asked) -> Backbone:
    adapter = _plain_adapter(asked)
    # RCF takes seed 0 for no seed.
    args = {'features': 512, **(asked.config.model_args or {})}
    model = RCF(len(adapter.bands), seed=asked.seed + 1, **args)
    return Backbone(asked.config.name or 'RCF', PooledEncoder(model), adapter)


def _patch_words(asked: _Asked) -> Backbone:
    adapter = _plain_adapter(asked)
    words = PatchWords(len(adapter.bands), **(asked.config.model_args or {}))
    return Backbone(asked.config.name or 'patch words', PatchWordsEncoder(words), adapter)


def _plain_adapter(asked: _Asked) -> Adapter:
    """Return an adapter to the bands of the configuration or of the data, normalised by band."""
    config = asked.config
    return Adapter(
        asked.data_bands,
        config.bands or list(asked.data_bands),
        statistics=_statistics(config, asked.statistics),
        missing=config.missing_bands,
        image_size=config.image_size,
    )


def _ours(asked: _Asked) -> Backbone:
    config, weights, data_bands, statistics, seed, random = asked
    builder = OursBuilder(config.model, weights, config.bands, config.model_args or {})
    # Loading a checkpoint draws random numbers, but random weights must depend only on the seed.
    torch.manual_seed(seed)
    model, lines = builder.build(data_bands, random)
    carried = builder.statistics
    chosen = _statistics(config, statistics, carried)
    lines += _statistics_lines(builder.title, chosen, carried)
    adapter = Adapter(
        data_bands,
        model.bands,
        statistics=chosen,
        clip=NO_STATISTICS.clip if carried is None else carried.clip,
        missing=config.missing_bands,
        image_size=config.image_size,
        multiple=model.patch_size,
    )
    return Backbone(
        config.name or builder.title,
        ViTEncoder(model),
        adapter,
        builder.architecture,
        builder.learned and not random,
        model,
        builder.name,
        lines,
    )


def _torchgeo(asked: _Asked) -> Backbone:
    config, _, data_bands, _, _, random = asked
    builder = TorchGeoBuilder(config.model, config.weights, config.model_args or {})
    model, size = builder.build(random)
    bands = config.bands or list(builder.bands)
    adapter = Adapter(
        data_bands,
        bands,
        Transformed(*builder.normalisation),
        missing=config.missing_bands,
        image_size=config.image_size or size,
    )
    lines = [f'{config.model}: the normalisation of its weights is used']
    name = builder.timm_name if isinstance(model, timm.models.VisionTransformer) else None
    encoder = encoder_of(model)
    return Backbone(
        config.name or config.model, encoder, adapter, config.model, not random, model, name, lines
    )


def _timm(asked: _Asked) -> Backbone:
    config, weights, data_bands, statistics, _, random = asked
    if not timm.is_model(config.model):
        raise ValueError(
            f"'{config.model}' is not a model: give an existing checkpoint, the name of a geofm or "
            'timm model, TorchGeo weights such as ViTSmall16_Weights.SENTINEL2_ALL_DINO, or a '
            f'baseline, {RCF_NAME} or {PATCH_WORDS_NAME}'
        )
    bands = tuple(config.bands or RGB_BANDS)
    args = {'num_classes': 0, 'in_chans': len(bands), **(config.model_args or {})}
    downloaded = config.pretrained and weights is None and not random
    model = _create_timm(config.model, downloaded, args)
    if weights is not None and not random:
        load_weights(model, weights)
    model.eval()
    lines: list[str] = []
    normalise: nn.Module | None = None
    learned = (downloaded or weights is not None) and not random
    if bands == RGB_BANDS and config.mean is None and config.pretrained:
        normalise = Transformed(Picture(), _picture_statistics(model))
        lines.append(
            f'{config.model}: normalised as an 8-bit image with its own mean and std; white is '
            f'reflectance {PICTURE_WHITE / 10_000}'
        )
    vit = hasattr(model, 'patch_embed') and hasattr(model, 'num_prefix_tokens')
    fixed = _fixed_size(model)
    adapter = Adapter(
        data_bands,
        bands,
        normalise,
        _statistics(config, statistics),
        config.missing_bands,
        config.image_size or fixed,
        model.patch_embed.patch_size[0] if vit else 1,
    )
    return Backbone(
        config.name or config.model,
        encoder_of(model),
        adapter,
        f'{config.model} {bands} {config.model_args}',
        learned,
        model,
        config.model if vit else None,
        lines,
    )


def _create_timm(name: str, pretrained: bool, args: dict[str, Any]) -> Any:
    """Create a model of timm, for images of any size if the model supports it."""
    try:
        try:
            return timm.create_model(name, pretrained, dynamic_img_size=True, **args)
        except TypeError:
            # Not a ViT, or a ViT with position embeddings of a fixed size.
            return timm.create_model(name, pretrained, **args)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f'{name}: its pretrained weights are not available: {error}. Give a file (weights), or '
            'set pretrained: false'
        ) from error


def _fixed_size(model: Any) -> int | None:
    """Return the fixed image size of a model of timm; None: any size."""
    if getattr(model, 'dynamic_img_size', False) or not hasattr(model, 'patch_embed'):
        return None
    size = getattr(model.patch_embed, 'img_size', None)
    return None if size is None else int(size[0])


def _picture_statistics(model: Any) -> nn.Module:
    return Standardize(model.pretrained_cfg['mean'], model.pretrained_cfg['std'])


def encoder_of(model: nn.Module) -> Encoder:
    """Return the encoder of a model.

    Args:
        model: A model of geofm or timm. Models other than ViTs must have no head.

    Returns:
        The encoder, which uses the model itself, not a copy.
    """
    if isinstance(model, MultiSensorViT | timm.models.VisionTransformer | timm.models.Eva):
        return ViTEncoder(model)
    return PooledEncoder(model)
