"""Export a backbone to a folder in timm's hub format, with a model card."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geofm.atomic import atomic_folder
from geofm.models.checkpoints.backbones import build_backbone
from geofm.models.checkpoints.definitions import carry_sensors
from geofm.models.checkpoints.files import HUB_WEIGHTS, CheckpointError, write_weights
from geofm.models.checkpoints.hub_args import DEFINED, STATISTICS
from geofm.models.checkpoints.model_file import read_model
from geofm.models.checkpoints.statistics import carry_statistics
from geofm.models.multisensor import MultiSensorViT
from geofm.models.weights.card import describe_training, model_card
from geofm.transforms import NO_STATISTICS

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
