"""Load fine-tuned tasks from checkpoints, and apply them to images."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from torch import Tensor, nn
from torchgeo.tasks import Classification, PixelwiseRegression, SemanticSegmentation

from geofm.legend import LEGEND_TAG, Legend, LegendError, MapClass, palette_color
from geofm.models import CheckpointError, MultiSensorViT
from geofm.models.checkpoints import (
    LOCAL_DIR,
    ModelFile,
    check_model_name,
    check_weights,
    read_model,
    take_up_sensors_of,
)
from geofm.printing import one_line
from geofm.sensors import check_bands
from geofm.tasks.mask2former import Mask2Former
from geofm.transforms import NO_STATISTICS, InputStatistics

#: Kind of a task: a class per image, a class per pixel, or a number per pixel.
Kind = Literal['classification', 'segmentation', 'regression']

#: TorchGeo's models that consist of a backbone and a decoder.
_DECODERS = ('unet', 'deeplabv3+', 'fcn', 'upernet', 'segformer', 'dpt')

#: Image sides must be multiples of this for an encoder with strides.
_STRIDE = 32

_MOST_CHANNELS, _MOST_OUTPUTS = 1024, 4096


@dataclass(frozen=True)
class FineTuned:
    """Fine-tuned task with its description.

    Attributes:
        kind: Kind of the output.
        task: The task in evaluation mode. It maps normalised images (B, C, H, W) to logits (B, K),
            logits (B, K, H, W) or numbers (B, K, H, W), depending on the kind.
        name: Names of the decoder, if any, and of the backbone.
        bands: Names of the input channels.
        statistics: Statistics that normalise the input.
        legend: Classes by index of the output; for a regression, names of the outputs.
        several: Whether a pixel may have several classes or none (multi-label).
        multiple: Image sides must be multiples of this, in pixels.
    """

    kind: Kind
    task: nn.Module
    name: str
    bands: tuple[str, ...]
    statistics: InputStatistics
    legend: Legend
    several: bool
    multiple: int

    @property
    def outputs(self) -> int:
        """Number of classes or numbers."""
        return self.legend.size


def load_fine_tuned(path: Path | ModelFile, bands: Sequence[str] | None = None) -> FineTuned:
    """Load a fine-tuned task.

    Supported tasks are TorchGeo's Classification, SemanticSegmentation and PixelwiseRegression, and
    :class:`geofm.tasks.Mask2Former`. The file is not trusted: the task is inferred from the
    hyperparameters, no class that the file names is imported, and all weights must fit.

    Args:
        path: Checkpoint that ``geofm fit`` or a Lightning ``Trainer`` wrote.
        bands: Names of the input channels. Required if neither the backbone nor the data module in
            the checkpoint states them.

    Returns:
        The task.

    Raises:
        CheckpointError: If the file is no checkpoint of such a task, or is damaged.
        BandError: If a band is unknown.
    """
    file = read_model(path)
    content, path = file.content, file.path
    if not isinstance(content, Mapping):
        raise CheckpointError(f'{path}: not a Lightning checkpoint')
    hparams, state = content.get('hyper_parameters'), content.get('state_dict')
    if not isinstance(hparams, Mapping) or not isinstance(state, Mapping):
        raise CheckpointError(f'{path}: not a checkpoint of a task; `geofm fit` writes them')
    take_up_sensors_of(content, path)
    weights = {k: v for k, v in state.items() if not str(k).startswith('criterion.')}
    weights = check_weights(weights, path)
    try:
        kind, task = _build(hparams)
        task.load_state_dict(weights)
    except Exception as error:
        # Parts of the model may raise anything for invalid arguments or weights.
        raise CheckpointError(f'{path}: {one_line(error)}') from error
    backbone = _backbone(task)
    statistics = file.statistics
    channels = int(hparams['in_channels'])
    return FineTuned(
        kind,
        task.eval(),
        '-'.join(str(hparams[k]) for k in ('model', 'backbone') if _used(hparams, k)),
        _bands(path, bands, backbone, statistics, channels),
        statistics or NO_STATISTICS,
        _legend(content, hparams, path),
        hparams.get('task') == 'multilabel',
        _multiple(task, backbone),
    )


def _build(hparams: Mapping[str, Any]) -> tuple[Kind, Any]:
    """Build a task with random weights, and return its kind and the task."""
    channels = _whole(hparams, 'in_channels', _MOST_CHANNELS)
    common: dict[str, Any] = {'weights': None, 'in_channels': channels}
    if 'num_queries' in hparams:
        return 'segmentation', Mask2Former(
            backbone=_model(hparams, 'backbone'),
            num_classes=_whole(hparams, 'num_classes', _MOST_OUTPUTS),
            num_queries=_whole(hparams, 'num_queries', _MOST_OUTPUTS),
            model_args=_plain(hparams.get('model_args')),
            **common,
        )
    decoder = hparams.get('model')
    dense = decoder in _DECODERS and 'backbone' in hparams
    if dense:
        common |= {'model': decoder, 'num_filters': _whole(hparams, 'num_filters', 4096)}
        common['backbone'] = _model(hparams, 'backbone')
    else:
        common['model'] = _model(hparams, 'model')
    if 'num_outputs' in hparams:
        if not dense:
            raise CheckpointError(
                'a regression of whole images cannot be mapped; train a PixelwiseRegression'
            )
        outputs = _whole(hparams, 'num_outputs', _MOST_OUTPUTS)
        return 'regression', PixelwiseRegression(num_outputs=outputs, **common)
    if hparams.get('task') not in ('binary', 'multiclass', 'multilabel'):
        raise CheckpointError(
            'not a Classification, SemanticSegmentation, PixelwiseRegression or Mask2Former; for '
            'maps of a pretrained backbone use `geofm map`'
        )
    common['task'] = hparams['task']
    for key in ('num_classes', 'num_labels'):
        if hparams.get(key) is not None:
            common[key] = _whole(hparams, key, _MOST_OUTPUTS)
    if dense:
        return 'segmentation', SemanticSegmentation(**common)
    return 'classification', Classification(**common)


def _used(hparams: Mapping[str, Any], key: str) -> bool:
    return isinstance(hparams.get(key), str) and (
        key == 'model' or 'num_queries' in hparams or hparams.get('model') in _DECODERS
    )


def _whole(hparams: Mapping[str, Any], key: str, most: int) -> int:
    value = hparams.get(key)
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(f'its hyperparameter {key} is not an integer from 1 to {most}')
    return value


def _model(hparams: Mapping[str, Any], key: str) -> str:
    """Return the name of a backbone that timm or segmentation-models-pytorch provides."""
    name = hparams.get(key)
    if not isinstance(name, str):
        raise CheckpointError(f'its hyperparameter {key} is not the name of a model')
    plain = name.removeprefix('tu-')
    if plain.startswith(LOCAL_DIR):
        raise CheckpointError(f'its model is described in a folder ({plain!a}); export it')
    if key == 'backbone' and name in smp_encoders:
        return name
    check_model_name(plain)
    return name


def _plain(args: Any) -> dict[str, Any]:
    """Check the arguments of Mask2Former's configuration."""
    if args is None:
        return {}
    if not isinstance(args, Mapping) or not all(
        isinstance(k, str) and re.fullmatch(r'[a-z_]{1,40}', k) and type(v) in (int, float, bool)
        for k, v in args.items()
    ):
        raise CheckpointError('its model_args are not a mapping of names to numbers')
    return dict(args)


def _bands(
    path: Path,
    given: Sequence[str] | None,
    backbone: MultiSensorViT | None,
    statistics: InputStatistics | None,
    channels: int,
) -> tuple[str, ...]:
    """Return the names of the input channels."""
    if given is not None:
        bands = check_bands(given)
    elif backbone is not None:
        bands = tuple(backbone.bands)
    elif statistics is not None and len(statistics.mean) == channels:
        bands = tuple(statistics.mean)
    else:
        raise CheckpointError(
            f'{path}: the bands of its {channels} channels are unknown: name them with --bands'
        )
    if len(bands) != channels:
        raise CheckpointError(
            f'{path}: has {channels} input channels, but {len(bands)} bands are given: {bands}'
        )
    return bands


def _legend(content: Mapping[Any, Any], hparams: Mapping[str, Any], path: Path) -> Legend:
    """Return the classes by index of the output."""
    outputs = hparams.get('num_classes') or hparams.get('num_labels')
    outputs = hparams.get('num_outputs', outputs) or 1
    regression = 'num_outputs' in hparams
    outputs = 2 if hparams.get('task') == 'binary' else outputs
    if outputs > 255:
        raise CheckpointError(f'{path}: has {outputs} classes, but a map can have at most 255')
    labels = hparams.get('labels')
    states = (state for state in content.values() if isinstance(state, Mapping))
    entry = next((state[LEGEND_TAG] for state in states if LEGEND_TAG in state), None)
    try:
        known: Legend | None = None
        if entry is not None and not regression:
            known = Legend.from_entry(entry)
        elif isinstance(labels, list | tuple) and labels and len(labels) <= outputs:
            known = Legend.of([str(label) for label in labels])
    except LegendError as error:
        raise CheckpointError(f'{path}: its classes are invalid: {error}') from error
    colors = {} if known is None else known.colors
    what = 'output' if regression else 'class'
    return Legend(
        tuple(
            MapClass(
                i,
                f'{what} {i}' if known is None else known.name(i),
                colors.get(i, palette_color(i)),
            )
            for i in range(outputs)
        )
    )


def _multiple(task: nn.Module, backbone: MultiSensorViT | None) -> int:
    """Return the number of pixels of which image sides must be multiples."""
    if backbone is not None:
        return int(backbone.patch_size)
    for module in task.modules():
        embed = getattr(module, 'patch_embed', None)
        size = getattr(embed, 'patch_size', None)
        if isinstance(size, tuple):
            return int(size[0])
    return _STRIDE


def check_model(task: FineTuned, side: int) -> None:
    """Check that a task supports windows of the given size.

    Args:
        task: The task.
        side: Side of the windows in pixels.

    Raises:
        ValueError: If the task does not support the size.
    """
    if side % task.multiple:
        raise ValueError(
            f'windows of {side} px: the model needs multiples of {task.multiple} px, such as '
            f'{max(1, round(side / task.multiple)) * task.multiple}'
        )
    probe = torch.zeros(1, len(task.bands), side, side, device=_device(task.task))
    try:
        with torch.inference_mode():
            task.task(probe)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f'the model {task.name} does not support windows of {side} px: {one_line(error)}; set '
            '--window to the size that it was trained with'
        ) from error


@contextmanager
def without_sensors(task: FineTuned, absent: Collection[str]) -> Iterator[None]:
    """Context in which a task treats some of its sensors as missing.

    The pixels of a missing sensor have no effect. The backbone handles missing sensors as in
    pretraining, see :meth:`geofm.models.MultiSensorViT.forward_features`.

    Args:
        task: The task.
        absent: Keys of the missing sensors; empty: the context does nothing.

    Yields:
        Nothing.

    Raises:
        ValueError: If the backbone does not support missing sensors.
    """
    if not absent:
        yield
        return
    backbone = _backbone(task.task)
    if backbone is None or not set(absent) < set(backbone.sensors):
        raise ValueError(
            f'the model {task.name} does not work without {", ".join(absent)}: missing sensors '
            'need a geofm backbone with several sensors'
        )
    backbone.absent = frozenset(absent)
    try:
        yield
    finally:
        backbone.absent = frozenset()


def _backbone(task: nn.Module) -> MultiSensorViT | None:
    """Return the geofm backbone of a task; None if it has another backbone."""
    return next((m for m in task.modules() if isinstance(m, MultiSensorViT)), None)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def logits(task: FineTuned, images: Tensor) -> Tensor:
    """Apply a task to normalised images.

    Args:
        task: The task.
        images: Normalised images (B, C, H, W).

    Returns:
        Logits in float32, (B, K, H, W), or (B, K, 1, 1) for a classification. A binary task has two
        classes: the first with logit 0, the second with the logit of the task.
    """
    output: Tensor = task.task(images).float()
    if task.kind == 'classification':
        output = output[..., None, None]
    elif output.ndim == 3:
        output = output[:, None]
    if output.shape[1] == 1 and task.outputs == 2:
        output = torch.cat([torch.zeros_like(output), output], dim=1)
    return output


__all__ = (
    'FineTuned',
    'Kind',
    'check_model',
    'load_fine_tuned',
    'logits',
    'without_sensors',
)
