"""Features of labelled images, computed once and kept in files."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import normalize

import geofm
from geofm.datasets import tensors_to
from geofm.evaluation.backbones import Adapter, Encoder
from geofm.evaluation.data import LabelledData, Split, class_labels
from geofm.models.checkpoints import hash_tensors, write_safetensors
from geofm.sensors import added_sensors

#: Files and folders of the package whose code may affect features.
_CODE = (
    'sensors',
    'datasets/named_bands.py',
    'transforms/picture.py',
    'transforms/statistics.py',
    'models',
    'evaluation/data/naming.py',
    'evaluation/data/sources.py',
    'evaluation/backbones/adapter.py',
    'evaluation/backbones/encoders.py',
    'evaluation/features.py',
)

#: Libraries whose versions may affect features.
_LIBRARIES = ('torch', 'timm', 'torchgeo', 'rasterio')

#: Key of the tensors' hash in the metadata of a file.
_DIGEST = 'sha256'


class LabelledFeatures(NamedTuple):
    """Features and labels of a data set.

    Attributes:
        features: Float32 of shape (N, ...): one or several vectors per image.
        labels: Int64 of shape (N,), or (N, classes) of multi-label data.
    """

    features: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Features:
    """Features and targets of a split.

    Attributes:
        values: Float32: vectors (N, V, D) of images, or feature maps (N, D, h, w).
        targets: Classes, int64 (N,) or (N, classes), or maps (N, H, W), see
            :meth:`LabelledData.targets`.
    """

    values: Tensor
    targets: Tensor


def side_by_side(values: Tensor, vectors: Sequence[int]) -> Tensor:
    """Concatenate vectors of images.

    Args:
        values: Vectors of shape (N, V, D).
        vectors: Indices of the vectors. If there are several, each is scaled to unit length, so
            that they have equal weight.

    Returns:
        Features of shape (N, len(vectors) x D).
    """
    if len(vectors) == 1:
        return values[:, vectors[0]]
    return normalize(values[:, list(vectors)], dim=-1).flatten(1)


def prepared_batches(
    adapter: Adapter, data: LabelledData, split: Split, device: torch.device | str = 'cpu'
) -> Iterator[Mapping[str, Any]]:
    """Read a split and prepare its batches for a backbone, lazily.

    Args:
        adapter: Prepares batches of the data.
        data: The data.
        split: The split.
        device: Device on which batches are prepared.

    Yields:
        Prepared batches.
    """
    for batch in data.loader(split):
        yield adapter(tensors_to(batch, device))


@torch.inference_mode()
def split_features(
    encoder: Encoder,
    adapter: Adapter,
    data: LabelledData,
    split: Split,
    device: torch.device | str = 'cpu',
    description: str | None = None,
) -> Features:
    """Compute the features of a split.

    Args:
        encoder: Computes features of prepared batches.
        adapter: Prepares batches of the data.
        data: The data.
        split: The split.
        device: Device to run on.
        description: Text of a progress bar. None: no progress bar.

    Returns:
        Features and targets, on the CPU.
    """
    adapter = adapter.to(device)
    compute = encoder.patches if data.dense else encoder.pooled
    values, targets = [], []
    loader: Iterable[Any] = data.loader(split)
    if description is not None:
        loader = track(loader, description)
    for batch in loader:
        tensors = tensors_to(batch, device)
        values.append(compute(adapter(tensors)).float().cpu())
        # On the CPU, because some of TorchGeo's data modules have lookup tables there.
        targets.append(data.targets(batch))
    return Features(torch.cat(values), torch.cat(targets))


# Not in inference mode: weights of a sharded model that are gathered here are used in training.
@torch.no_grad()
def extract_features(
    encoder: Callable[[Mapping[str, Any]], Tensor],
    batches: Iterable[Mapping[str, Any]],
    prepare: Callable[[dict[str, Any]], Mapping[str, Any]],
    device: torch.device | str = 'cpu',
) -> LabelledFeatures:
    """Compute the features of all batches with a model that may be in training.

    Args:
        encoder: Function that computes the features of a normalised batch.
        batches: Batches with ``image`` and ``label``, e.g. a data loader.
        prepare: Function that normalises a batch on the device.
        device: Device to run on.

    Returns:
        Features and labels, on the CPU.

    Raises:
        ValueError: If there is no batch, if a batch has no labels, or if a label is invalid.
    """
    features, labels = [], []
    for batch in batches:
        if 'label' not in batch:
            raise ValueError(f"batches must have a 'label'; this batch has {sorted(batch)}")
        tensors = tensors_to(batch, device)
        features.append(encoder(prepare(tensors)).float().cpu())
        labels.append(class_labels(batch['label'].cpu(), 'the labelled data'))
    if not features:
        raise ValueError('no features to compute: the data loader is empty')
    return LabelledFeatures(torch.cat(features), torch.cat(labels))


def feature_key(
    encoder: Encoder, adapter: Adapter, data: LabelledData, split: Split, device: str
) -> str:
    """Hash everything that the features of a split depend on.

    This includes the weights, the bands and their preprocessing, the data (see
    :meth:`LabelledData.fingerprint`), the code, and the batch size and type of device, which affect
    rounding.

    Args:
        encoder: The encoder.
        adapter: Prepares batches of the data.
        data: The data.
        split: The split.
        device: Device on which features are computed.

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
    """A folder of features, named by :func:`feature_key`."""

    def __init__(self, folder: Path | None, say: Callable[[str], None]) -> None:
        """Initialize a new FeatureCache instance.

        Args:
            folder: The folder. None: features are not kept.
            say: Function that prints a message, called if a file cannot be used.
        """
        self.folder = folder
        self.say = say

    def get(self, key: str, compute: Callable[[], Features]) -> Features:
        """Return the features of a key, computed unless the folder has them.

        Args:
            key: The key.
            compute: Function that computes the features.

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
            self.say(f'{path}: damaged; its features are computed again')
        features = compute()
        _write(path, features)
        return features


def _read(path: Path) -> Features | None:
    """Read the features in a file; None if it is damaged."""
    try:
        with safe_open(path, framework='pt') as file:
            digest = (file.metadata() or {}).get(_DIGEST)
            tensors = {name: file.get_tensor(name) for name in ('values', 'targets')}
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
    return Features(**tensors) if digest == hash_tensors(tensors) else None


def _write(path: Path, features: Features) -> None:
    tensors = {'values': features.values, 'targets': features.targets}
    # Written atomically, because several processes may write the same features.
    write_safetensors(tensors, path, {_DIGEST: hash_tensors(tensors)})


def hash_module(module: nn.Module) -> str:
    """Hash the structure, the parameters and all buffers of a module.

    Args:
        module: The module.

    Returns:
        SHA-256 in hexadecimal.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return hashlib.sha256(f'{module!r}\n{hash_tensors(tensors)}'.encode()).hexdigest()


def code_version() -> str:
    """Hash the code, the versions of libraries and the user's sensors that features depend on.

    Returns:
        SHA-256 in hexadecimal.
    """
    added = ' '.join(map(repr, added_sensors()))
    return hashlib.sha256(f'{_code_version()} {added}'.encode()).hexdigest()


@cache
def _code_version() -> str:
    root = Path(inspect.getfile(geofm)).parent
    digest = hashlib.sha256(' '.join(f'{name} {version(name)}' for name in _LIBRARIES).encode())
    for part in _CODE:
        path = root / part
        for file in sorted(path.rglob('*.py')) if path.is_dir() else [path]:
            digest.update(f'{file.relative_to(root)}\n'.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
