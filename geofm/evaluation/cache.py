"""Features on disk, found again by what they were made of."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from geofm.evaluation.adapter import Adapter
from geofm.evaluation.data import LabelledData, Split
from geofm.evaluation.encoders import Encoder
from geofm.evaluation.features import Features
from geofm.evaluation.hashing import code_version, hash_module, hash_tensors
from geofm.models.weights.files import write_safetensors

#: Where the hash of the tensors stands in a file.
_DIGEST = 'sha256'


def feature_key(
    encoder: Encoder, adapter: Adapter, data: LabelledData, split: Split, device: str
) -> str:
    """What the features of a split depend on, as a hash.

    Weights, bands and preprocessing, the data (see :meth:`LabelledData.fingerprint`) and the code;
    the batch size and the kind of device too, for they change the last bits.

    Args:
        encoder: The encoder.
        adapter: What brings the data to it.
        data: The data.
        split: The split.
        device: Where features are computed.

    Returns:
        SHA-256 in hexadecimal.
    """
    parts = (
        hash_module(encoder),
        hash_module(adapter),
        data.fingerprint(split),
        code_version(),
        str(data.batch_size),
        str(data.ignore_index),
        torch.device(device).type,
    )
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()


class FeatureCache:
    """A folder of features."""

    def __init__(self, folder: Path | None, say: Callable[[str], None]) -> None:
        """Initialize a new FeatureCache instance.

        Args:
            folder: The folder; None keeps nothing.
            say: Called with a line where a file cannot be used.
        """
        self.folder = folder
        self.say = say

    def get(self, key: str, compute: Callable[[], Features]) -> Features:
        """Features under a key, computed if they are not there.

        Args:
            key: The key.
            compute: Computes them.

        Returns:
            The features.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f'{key}.safetensors'
        if path.is_file():
            features = _read(path)
            if features is not None:
                return features
            self.say(f'{path}: damaged, so its features are computed again')
        features = compute()
        _write(path, features)
        return features


def _read(path: Path) -> Features | None:
    """Features in a file, or None if it is damaged."""
    try:
        with safe_open(path, framework='pt') as file:
            digest = (file.metadata() or {}).get(_DIGEST)
            tensors = {name: file.get_tensor(name) for name in ('values', 'targets')}
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
    return Features(**tensors) if digest == hash_tensors(tensors) else None


def _write(path: Path, features: Features) -> None:
    tensors = {'values': features.values, 'targets': features.targets}
    # Several processes may write the same features.
    write_safetensors(tensors, path, {_DIGEST: hash_tensors(tensors)})
