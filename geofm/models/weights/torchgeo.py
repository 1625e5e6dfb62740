"""The one file that TorchGeo's tasks take as *weights*.

``torchgeo.tasks.utils.extract_backbone`` keeps every key that contains ``model.`` and strips that.
``Classification`` then wants the backbone's own names; ``SemanticSegmentation`` loads strictly,
into an encoder that calls the backbone ``model``. So the file holds each weight under two names
(the numbers are stored once), of which one is ``model.`` again when TorchGeo has stripped it; and
our models do not count the other name of a weight that they have as unexpected.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

#: Before a weight's name in the file: what Classification, and SemanticSegmentation, will see.
_CLASSIFICATION = 'model.'
_SEGMENTATION = 'modelmodel..'


def torchgeo_checkpoint(hparams: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """Make a checkpoint that TorchGeo's ``Classification`` and ``SemanticSegmentation`` take.

    Args:
        hparams: Hyperparameters of the DINOv2 task.
        weights: Weights of its backbone.

    Returns:
        What to write with ``torch.save``; :func:`geofm.models.load_backbone` reads it too.
    """
    names = [(prefix, key) for prefix in (_CLASSIFICATION, _SEGMENTATION) for key in weights]
    return {
        'hyper_parameters': dict(hparams),
        'state_dict': {prefix + key: weights[key] for prefix, key in names},
    }


def accept_both_names[Module: nn.Module](model: Module) -> Module:
    """Let a model overlook the other name of a weight that it has.

    A weight that is missing is an error all the same.

    Args:
        model: The model; changed in place.

    Returns:
        The model.
    """
    model.register_load_state_dict_post_hook(_forget_other_names)
    return model


def _forget_other_names(model: nn.Module, incompatible: Any) -> None:
    own = set(model.state_dict())
    unexpected: list[str] = incompatible.unexpected_keys
    unexpected[:] = [key for key in unexpected if key.removeprefix('model.') not in own]
