"""Model card of a backbone in Markdown. All values from files are escaped."""

import html
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

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
