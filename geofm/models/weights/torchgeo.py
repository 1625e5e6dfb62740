"""The one file that TorchGeo's tasks take as *weights*.

``torchgeo.tasks.utils.extract_backbone`` keeps every key that contains ``model.`` and strips that.
``Classification`` then wants the backbone's own names; ``SemanticSegmentation`` loads strictly,
into an encoder that calls the backbone ``model``. So the file holds each weight under two names
(the numbers are stored once), of which one is ``model.`` again when TorchGeo has stripped it; and
our models do not count the other name of a weight that they have as unexpected.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from geofm.models.architecture import KEY, Architecture
from geofm.models.by_name import BuiltByName, description, marker_name

#: Before a weight's name in the file: what Classification, and SemanticSegmentation, will see.
_CLASSIFICATION = 'model.'
_SEGMENTATION = 'modelmodel..'

#: What to do where none of the weights has the name it should.
_NONE = (
    'no weights of the backbone: TorchGeo loads DPT from what `geofm export --to torchgeo` writes'
)


def torchgeo_checkpoint(
    hparams: Mapping[str, Any], weights: Mapping[str, Tensor], architecture: Architecture | None
) -> Any:
    """Make a checkpoint that TorchGeo's ``Classification`` and ``SemanticSegmentation`` take.

    Args:
        hparams: Hyperparameters of the DINOv2 task.
        weights: Weights of its backbone.
        architecture: Architecture of its backbone, which a model that is built by its name takes
            from among the weights.

    Returns:
        What to write with ``torch.save``; :func:`geofm.models.load_backbone` reads it too.
    """
    if architecture is not None:
        weights = {**weights, **description(architecture, weights)}
    names = [(prefix, key) for prefix in (_CLASSIFICATION, _SEGMENTATION) for key in weights]
    return {
        'hyper_parameters': dict(hparams),
        'state_dict': {prefix + key: weights[key] for prefix, key in names},
    }


def is_for_dpt(name: str) -> bool:
    """Whether DPT loads a weight of a checkpoint.

    Args:
        name: Name of the weight.

    Returns:
        Whether the name is what DPT's encoder calls the weight, once TorchGeo has stripped it.
    """
    return name.replace(_CLASSIFICATION, '').startswith(_CLASSIFICATION)


def accept_both_names[Module: BuiltByName](model: Module) -> Module:
    """Let a model overlook the other name of a weight that it has.

    A weight that is missing is an error all the same.

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
    # DPT's encoder is not ours, so all that can be done about its hundreds of names is to say why.
    if (prefix := model.missing_prefix) is not None:
        missing: list[str] = incompatible.missing_keys
        rest = [key for key in missing if not key.startswith(prefix)]
        missing[:] = [*rest, f'{prefix}* ({_NONE})']
    unexpected[:] = [key for key in unexpected if key.removeprefix('model.') not in own]
