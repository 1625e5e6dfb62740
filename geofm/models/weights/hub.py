"""Export a backbone as a folder for the Hugging Face Hub, with a model card."""

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from geofm.atomic import atomic_folder
from geofm.models.checkpoints.backbones import build_backbone
from geofm.models.checkpoints.definitions import carry_sensors
from geofm.models.checkpoints.files import HUB_WEIGHTS, CheckpointError, write_weights
from geofm.models.checkpoints.hub_args import DEFINED, STATISTICS
from geofm.models.checkpoints.model_file import read_model
from geofm.models.checkpoints.statistics import carry_statistics
from geofm.models.multisensor import MultiSensorViT
from geofm.sensors import SENSORS, sensor_of
from geofm.transforms import NO_STATISTICS

#: Characters that Markdown may interpret as markup.
_MARKUP = re.compile(r'([\\`*_{}\[\]()#+!|~:@$^=-])')

#: Largest length of a text from a file, in characters.
_LONGEST = 200

_USE = """\
```python
import timm
import geofm.models  # registers the architecture
from geofm.transforms import Normalize

model = timm.create_model('local-dir:FOLDER', pretrained=True)

backbone = geofm.models.load_backbone('FOLDER')
statistics = backbone.statistics  # as in the table below; None: use geofm.transforms.Normalize
normalize = statistics.normalize(backbone.bands) if statistics else Normalize(backbone.bands)
```
"""


class Training(NamedTuple):
    """Description of the training in a checkpoint.

    Attributes:
        data: Names of the data modules.
        hyperparameters: Numbers, flags and short texts by name.
        metrics: Monitored metrics by name.
    """

    data: tuple[str, ...]
    hyperparameters: Mapping[str, Any]
    metrics: Mapping[str, float]


def describe_training(content: Any, hparams: Mapping[str, Any]) -> Training:
    """Collect the description of the training in a checkpoint.

    Args:
        content: Result of :func:`~geofm.models.checkpoints.files.read_file`.
        hparams: Hyperparameters of the task.

    Returns:
        Data modules, numeric hyperparameters and metrics. Texts are left out, as they may be paths.
    """
    content = content if isinstance(content, Mapping) else {}
    plain = {
        str(key): value
        for key, value in hparams.items()
        if isinstance(value, bool | int | float)
        or (isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value))
    }
    for key in ('epoch', 'global_step'):
        if type(content.get(key)) is int:
            plain[key] = content[key]
    callbacks = content.get('callbacks')
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    metrics = {}
    for state in states:
        if not isinstance(state, Mapping) or not isinstance(state.get('monitor'), str):
            continue
        score = state.get('best_model_score', state.get('best_score'))
        if isinstance(score, torch.Tensor) and score.numel() == 1:
            metrics[state['monitor']] = float(score)
    names = [key for key in content if isinstance(key, str)]
    data = tuple(name for name in names if name.endswith('DataModule'))
    return Training(data, plain, metrics)


def escape(value: Any) -> str:
    """Format a value from a file as Markdown text on one line.

    Args:
        value: The value.

    Returns:
        Text of at most 200 characters with markup of Markdown and HTML escaped.
    """
    text = ' '.join(''.join(c if c.isprintable() else ' ' for c in str(value)).split())
    if len(text) > _LONGEST:
        text = f'{text[:_LONGEST]} ...'
    return _MARKUP.sub(r'\\\1', html.escape(text, quote=False))


def model_card(model: MultiSensorViT, training: Training, licence: str | None) -> str:
    """Create the model card of a backbone.

    Args:
        model: The backbone.
        training: Description of the training.
        licence: Identifier of the licence; None: leave a placeholder.

    Returns:
        Markdown with the header for Hugging Face.
    """
    architecture = model.architecture
    name = 'MultiSensorViT' if architecture is None else architecture.model
    sensors = [escape(SENSORS[key].name) for key in model.sensors]
    license_line = f'license: {licence}\n' if licence else ''
    given = {} if architecture is None else architecture.model_args
    header = f'---\nlibrary_name: timm\n{license_line}tags:\n- remote-sensing\n- geofm\n---\n'
    parts = [
        f'{header}\n# {escape(name)}',
        f'A vision transformer pretrained with geofm on images of {", ".join(sensors)}.',
        f'## Use\n\n{_USE}',
        f'## Input\n\n{_input(model)}',
        '## Data\n\n' + (_list(training.data) or 'Not stated in the checkpoint.'),
        '## Architecture\n\n'
        + _table({'patch_size': model.patch_size, 'embed_dim': model.embed_dim, **given}),
        '## Hyperparameters\n\n' + _table(training.hyperparameters),
        '## Metrics\n\n' + _table(training.metrics),
        '## Licence\n\n' + (escape(licence) if licence else 'To be stated by the publisher.'),
    ]
    return '\n\n'.join(part.rstrip() for part in parts) + '\n'


def _input(model: MultiSensorViT) -> str:
    """Describe bands, units and normalisation."""
    normalize = (model.statistics or NO_STATISTICS).normalize(model.bands)
    rows = zip(model.bands, normalize.mean.flatten(), normalize.std.flatten(), strict=True)
    lines = ['| channel | band | sensor | unit | mean | std |', '|---:|---|---|---|---:|---:|']
    for number, (band, mean, std) in enumerate(rows):
        sensor = sensor_of(band)
        texts = (number, band, sensor.name, sensor.unit, f'{mean:.6g}', f'{std:.6g}')
        lines.append('| ' + ' | '.join(escape(text) for text in texts) + ' |')
    clip = 'not clipped' if normalize.clip is None else f'clipped to +-{normalize.clip:g}'
    return (
        '\n'.join(lines)
        + f'\n\nValues are (x - mean) / std, {clip}, and 0 where a band has no data. Height and '
        f'width are multiples of {model.patch_size} pixels.'
    )


def _list(values: tuple[str, ...]) -> str:
    return '\n'.join(f'- {escape(value)}' for value in values)


def _table(values: Mapping[str, Any]) -> str:
    if not values:
        return 'None in the checkpoint.'
    lines = [f'| {escape(key)} | {escape(value)} |' for key, value in values.items()]
    return '\n'.join(['| name | value |', '|---|---|', *lines])


#: Form of licence identifiers of Hugging Face.
_LICENSE = re.compile(r'[A-Za-z0-9][A-Za-z0-9.+-]{0,63}')


def export_hub(
    checkpoint: Path, output: Path, licence: str | None = None, half: bool = False
) -> Path:
    """Write a folder for ``timm.create_model('local-dir:FOLDER', pretrained=True)``.

    It contains ``config.json``, ``model.safetensors`` and the model card ``README.md``. Paths in
    the checkpoint are not written, so the folder can be published.

    Args:
        checkpoint: Lightning checkpoint of a pretraining task, such as
            :class:`geofm.tasks.DINOv2`, or an export of it.
        output: Folder to write. It must not exist or must be empty.
        licence: Identifier of the licence, such as 'cc-by-4.0'; None: leave a placeholder.
        half: Whether to write the weights in float16, which halves the size. They are converted to
            float32 when loaded.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the checkpoint cannot be read or is of another kind.
        FileExistsError: If the folder exists and is not empty.
        ValueError: If the licence is not an identifier, or a weight is too large for float16.
    """
    if licence is not None and not _LICENSE.fullmatch(licence):
        raise ValueError(f"license: give an identifier such as 'cc-by-4.0', not {licence!r}")
    file = read_model(checkpoint)
    read = file.require_pretrained()
    model = build_backbone(read)
    config = hub_config(model, licence)
    described = ('model', 'in_channels', 'bands', 'model_args')
    said = {
        'hyper_parameters': {key: read.hparams[key] for key in described},
        **carry_statistics(read.statistics),
        **carry_sensors(model.sensors),
    }
    card = model_card(model, describe_training(file.content, read.hparams), licence)
    weights = {
        k: v.half() if half and v.is_floating_point() else v for k, v in read.weights.items()
    }
    if overflown := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f'{checkpoint}: values of {overflown[0]} are too large for float16')
    with atomic_folder(output) as folder:
        write_weights(weights, folder / HUB_WEIGHTS, said)
        (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
        (folder / 'README.md').write_text(card, encoding='utf-8')
    return output


def hub_config(model: MultiSensorViT, licence: str | None = None) -> dict[str, Any]:
    """Return the content of ``config.json`` for a backbone.

    Args:
        model: The backbone.
        licence: Identifier of the licence.

    Returns:
        JSON values: the architecture, its arguments with bands, sensor definitions and statistics,
        and timm's ``pretrained_cfg``.

    Raises:
        CheckpointError: If an argument of the model is not a JSON value.
    """
    architecture = model.architecture
    if architecture is None:
        raise CheckpointError(
            'the model has arguments that are not JSON values, so it has no hub format'
        )
    statistics = model.statistics or NO_STATISTICS
    normalize = statistics.normalize(model.bands)
    size = _image_size(architecture.model_args)
    pretrained: Mapping[str, Any] = {
        'input_size': [len(model.bands), *size],
        'num_classes': 0,
        'classifier': 'head',
        'mean': normalize.mean.flatten().tolist(),
        'std': normalize.std.flatten().tolist(),
        **({'license': licence} if licence else {}),
    }
    return {
        'architecture': architecture.model,
        'num_classes': 0,
        'num_features': model.embed_dim,
        'model_args': {
            **architecture.model_args,
            'in_chans': len(model.bands),
            'bands': list(model.bands),
            DEFINED: carry_sensors(model.sensors)['sensors'],
            **({} if model.statistics is None else {STATISTICS: model.statistics.entry()}),
        },
        'pretrained_cfg': dict(pretrained),
    }


def _image_size(model_args: Mapping[str, Any]) -> list[int]:
    """Return height and width in pixels of images for which positions are stored."""
    size = model_args.get('img_size', 224)
    return [size, size] if isinstance(size, int) else [int(size[0]), int(size[-1])]
