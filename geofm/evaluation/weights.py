"""Files of weights."""

from pathlib import Path

from torch import nn

from geofm.models import CheckpointError
from geofm.models.task_checkpoints import read_weights


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of weights into a model without a head.

    Args:
        model: The model; changed in place.
        path: A ``.pth`` or ``.safetensors`` file, or a TorchGeo task's checkpoint.

    Raises:
        CheckpointError: If it cannot be read or does not fit.
    """
    heads = ('head.', 'fc.', 'classifier.')
    weights = {k: v for k, v in read_weights(path).items() if not k.startswith(heads)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f'{path}: its weights do not fit {type(model).__name__}: {error}'
        ) from error
