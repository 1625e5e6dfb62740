"""Files of weights."""

from pathlib import Path

import timm
from torch import nn

from geofm.models import CheckpointError


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of weights into a model without a head.

    Args:
        model: The model; changed in place.
        path: A ``.pth`` or ``.safetensors`` file.

    Raises:
        CheckpointError: If it cannot be read or does not fit.
    """
    if not path.is_file():
        raise CheckpointError(f'{path}: no such file')
    try:
        weights = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:
        # A dozen kinds of error, by the kind of file that it is not.
        raise CheckpointError(f'{path}: no readable file of weights: {error}') from error
    heads = ('head.', 'fc.', 'classifier.')
    weights = {k: v for k, v in weights.items() if not k.startswith(heads)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f'{path}: its weights do not fit {type(model).__name__}: {error}'
        ) from error
