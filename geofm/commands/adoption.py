"""Taking the model of a task from the initial checkpoint."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import timm
from lightning.fabric.utilities import rank_zero_info

from geofm.models import MODEL_NAMES, CheckpointError
from geofm.models.checkpoints import ModelFile, is_sharded, read_model
from geofm.models.weights import is_for_dpt
from geofm.tasks import PretrainingTask

#: Models of TorchGeo's segmentation tasks that are built around a backbone.
_DECODERS = ('unet', 'deeplabv3+', 'upernet', 'segformer', 'dpt')

#: Prefix of timm models in segmentation-models-pytorch.
_TIMM = 'tu-'


def adopt_model(model: Any) -> None:
    """Set the model in a task's configuration to the model of its initial checkpoint.

    TorchGeo's tasks build a model by name and then load ``weights``. If both the model and the
    weights are geofm's, the name is taken from the checkpoint.

    Args:
        model: Configuration of the task, with ``class_path`` and ``init_args``; changed in place.

    Raises:
        CheckpointError: If the weights are a checkpoint of geofm, but the model is not geofm's, or
            if TorchGeo cannot load the checkpoint.
    """
    args = model.get('init_args') or {}
    weights = args.get('weights')
    if not isinstance(weights, str) or not (Path(weights).is_file() or is_sharded(Path(weights))):
        return
    # Pretraining builds the model of its configuration, whatever weights it starts from.
    if _pretrains(model):
        return
    if is_sharded(Path(weights)):
        raise CheckpointError(
            f'{weights}: TorchGeo does not load sharded checkpoints: convert it with '
            f"'geofm export {weights} FILE --to torchgeo'"
        )
    file = read_model(weights)
    if (name := _model_of(file)) is None:
        return
    if args.get('model') == 'dpt' and not _is_for_dpt(file):
        raise CheckpointError(
            f"{weights}: TorchGeo's DPT does not load this checkpoint: convert it with 'geofm "
            f"export {weights} FILE --to torchgeo', or use segformer, upernet or unet"
        )
    for key in ('model', 'backbone'):
        given = args.get(key)
        if not isinstance(given, str):
            continue
        plain = given.removeprefix(_TIMM)
        wanted = given.removesuffix(plain) + name
        if plain in MODEL_NAMES and plain != name:
            args[key] = wanted
            rank_zero_info(f'{key}: {wanted} from {weights}, in place of {given}')
            continue
        used = key == 'model' or args.get('model') in _DECODERS
        if used and plain not in MODEL_NAMES and timm.is_model(plain):
            raise CheckpointError(
                f"{weights}: weights of '{name}', but {key} is '{given}': set {key} to '{name}'"
            )


def _pretrains(model: Any) -> bool:
    """Return whether a configuration describes a pretraining task."""
    found = resolve_name(str(model.get('class_path')))
    return isinstance(found, type) and issubclass(found, PretrainingTask)


def _is_for_dpt(file: ModelFile) -> bool:
    """Return whether a file has weights with the parameter names of DPT's encoder."""
    content = file.content
    state = content.get('state_dict') if isinstance(content, dict) else None
    return isinstance(state, dict) and any(is_for_dpt(name) for name in state)


def _model_of(file: ModelFile) -> str | None:
    """Return the model name in a checkpoint of geofm, or of a task with a model of geofm."""
    if file.pretrained is not None:
        return str(file.pretrained.hparams['model'])
    found = file.task
    return found.model if found is not None and found.model in MODEL_NAMES else None
