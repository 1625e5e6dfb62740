"""Fine-tuning starts from the checkpoint's model, whatever size a configuration names."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import timm
from lightning.fabric.utilities import rank_zero_info

from geofm.models import MODEL_NAMES, CheckpointError
from geofm.models.checkpoints.model_file import ModelFile, read_model
from geofm.models.checkpoints.sharded import is_sharded
from geofm.models.weights.torchgeo import is_for_dpt
from geofm.tasks.pretraining import PretrainingTask

#: Models of TorchGeo's that are built around a backbone.
_DECODERS = ('unet', 'deeplabv3+', 'upernet', 'segformer', 'dpt')

#: How segmentation-models-pytorch is told of a model of timm.
_TIMM = 'tu-'


def adopt_model(model: Any) -> None:
    """Name the model of a checkpoint in the configuration of a task that starts from it.

    A task of TorchGeo builds a model by its name and then loads ``weights``. Where both are of
    geofm, the checkpoint says which model it is.

    Args:
        model: Configuration of the task, with ``class_path`` and ``init_args``; changed in place.

    Raises:
        CheckpointError: If the weights are a checkpoint of geofm, and the model is none.
    """
    args = model.get('init_args') or {}
    weights = args.get('weights')
    if not isinstance(weights, str) or not (Path(weights).is_file() or is_sharded(Path(weights))):
        return
    # Pretraining builds the model that its configuration names, whatever it starts from.
    if _pretrains(model):
        return
    if is_sharded(Path(weights)):
        raise CheckpointError(
            f"{weights}: a sharded checkpoint, which TorchGeo does not load: 'geofm export "
            f"{weights} FILE --to torchgeo' writes what it loads"
        )
    file = read_model(weights)
    if (name := _model_of(file)) is None:
        return
    if args.get('model') == 'dpt' and not _is_for_dpt(file):
        raise CheckpointError(
            f"{weights}: TorchGeo's DPT does not load it as it is: 'geofm export {weights} FILE "
            "--to torchgeo' writes what it loads; or take segformer, upernet or unet"
        )
    for key in ('model', 'backbone'):
        given = args.get(key)
        if not isinstance(given, str):
            continue
        plain = given.removeprefix(_TIMM)
        wanted = given.removesuffix(plain) + name
        if plain in MODEL_NAMES and plain != name:
            args[key] = wanted
            rank_zero_info(f'{key}: {wanted}, as in {weights}, in place of {given}')
            continue
        used = key == 'model' or args.get('model') in _DECODERS
        if used and plain not in MODEL_NAMES and timm.is_model(plain):
            raise CheckpointError(
                f"{weights}: weights of '{name}', and {key} is '{given}': name that model"
            )


def _pretrains(model: Any) -> bool:
    """Whether a configuration is that of a task of self-supervised pretraining."""
    found = resolve_name(str(model.get('class_path')))
    return isinstance(found, type) and issubclass(found, PretrainingTask)


def _is_for_dpt(file: ModelFile) -> bool:
    """Whether a file has the weights under the names that DPT's encoder has for them."""
    content = file.content
    state = content.get('state_dict') if isinstance(content, dict) else None
    return isinstance(state, dict) and any(is_for_dpt(name) for name in state)


def _model_of(file: ModelFile) -> str | None:
    """Name of the model of a checkpoint of geofm, or of a task on one of its models."""
    if file.pretrained is not None:
        return str(file.pretrained.hparams['model'])
    found = file.task
    return found.model if found is not None and found.model in MODEL_NAMES else None
