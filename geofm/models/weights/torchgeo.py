"""Checkpoints that TorchGeo's tasks load as *weights*.

``torchgeo.tasks.utils.extract_backbone`` keeps every key that contains ``model.`` and removes all
occurrences of it. ``Classification`` then needs the backbone's own names, but the encoder of
``SemanticSegmentation`` with DPT needs them with the prefix ``model.`` and loads strictly. One file
for both therefore has each weight under two names; the data are stored once. For a ViT-S, the 359
further names add 21 kB to a file of 184 MB, and no measurable time to loading. The name for DPT is
``modelmodel..NAME``, which becomes ``model.NAME`` when TorchGeo removes ``model.``. geofm's models
ignore the second name of a weight.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from geofm.models.architecture import KEY, Architecture
from geofm.models.by_name import BuiltByName, description, marker_name

#: Prefixes of a weight's two names in the file: for Classification, and for DPT.
_CLASSIFICATION = 'model.'
_SEGMENTATION = 'modelmodel..'

#: Advice if none of the weights has the expected name.
_NONE = (
    'no weights of the backbone: TorchGeo loads DPT from what `geofm export --to torchgeo` writes'
)


def torchgeo_checkpoint(
    hparams: Mapping[str, Any], weights: Mapping[str, Tensor], architecture: Architecture | None
) -> Any:
    """Make a checkpoint for TorchGeo's ``Classification`` and ``SemanticSegmentation``.

    Args:
        hparams: Hyperparameters of the pretraining task.
        weights: Weights of the backbone.
        architecture: Architecture of the backbone, to store with the weights.

    Returns:
        Content to write with ``torch.save``. :func:`geofm.models.load_backbone` reads it, too.
    """
    if architecture is not None:
        weights = {**weights, **description(architecture, weights)}
    names = [(prefix, key) for prefix in (_CLASSIFICATION, _SEGMENTATION) for key in weights]
    return {
        'hyper_parameters': dict(hparams),
        'state_dict': {prefix + key: weights[key] for prefix, key in names},
    }


def is_for_dpt(name: str) -> bool:
    """Return whether DPT loads a weight of a checkpoint.

    Args:
        name: Name of the weight in the file.

    Returns:
        True if it is the name in DPT's encoder after TorchGeo has removed ``model.``.
    """
    return name.replace(_CLASSIFICATION, '').startswith(_CLASSIFICATION)


def accept_both_names[Module: BuiltByName](model: Module) -> Module:
    """Make a model ignore the second name of a weight when loading.

    Missing weights are still errors.

    Args:
        model: The model; changed in place.

    Returns:
        The model.
    """
    model.register_load_state_dict_post_hook(_forget_other_names)
    return model


def _forget_other_names(model: Any, incompatible: Any) -> None:
    own = {*model.state_dict(), KEY, marker_name(model)}
    unexpected: list[str] = incompatible.unexpected_keys
    # DPT's encoder is not part of geofm. Replace its hundreds of missing names by one explanation.
    if (prefix := model.missing_prefix) is not None:
        missing: list[str] = incompatible.missing_keys
        rest = [key for key in missing if not key.startswith(prefix)]
        missing[:] = [*rest, f'{prefix}* ({_NONE})']
    unexpected[:] = [key for key in unexpected if key.removeprefix('model.') not in own]
