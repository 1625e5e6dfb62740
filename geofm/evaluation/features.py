"""Features of labelled images, computed once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import normalize

from geofm.datasets.transfer import tensors_to
from geofm.evaluation.adapter import Adapter
from geofm.evaluation.data import LabelledData, Split
from geofm.evaluation.encoders import Encoder
from geofm.evaluation.labels import class_labels


class LabelledFeatures(NamedTuple):
    """Features and labels of a data set.

    Attributes:
        features: Float32 of shape (N, ...): one vector an image, or several.
        labels: Int64 of shape (N,), or (N, classes) where an image can have several.
    """

    features: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Features:
    """Features and targets of a split.

    Attributes:
        values: Float32: vectors (N, V, D) of images, or (N, D, h, w) on the ground.
        targets: Classes int64 (N,) or (N, classes), or maps (N, H, W), see
            :meth:`LabelledData.targets`.
    """

    values: Tensor
    targets: Tensor


def side_by_side(values: Tensor, vectors: Sequence[int]) -> Tensor:
    """Some of the vectors of images as one.

    Args:
        values: Vectors of shape (N, V, D).
        vectors: Which. If there are several, each is brought to unit length, so that none
            outweighs another.

    Returns:
        Of shape (N, len(vectors) x D).
    """
    if len(vectors) == 1:
        return values[:, vectors[0]]
    return normalize(values[:, list(vectors)], dim=-1).flatten(1)


def prepared_batches(
    adapter: Adapter, data: LabelledData, split: Split, device: torch.device | str = 'cpu'
) -> Iterator[Mapping[str, Any]]:
    """Read the images of a split as a backbone takes them.

    Args:
        adapter: From a batch of the data to a prepared one.
        data: The data.
        split: The split.
        device: Where to prepare them.

    Yields:
        Prepared batches; nothing is read before the first is asked for.
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
        encoder: From a prepared batch to features.
        adapter: From a batch of the data to a prepared one.
        data: The data.
        split: The split.
        device: Where to compute.
        description: Text of a progress bar; None shows none.

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
        # On the CPU: some of TorchGeo's data modules keep tables there.
        targets.append(data.targets(batch))
    return Features(torch.cat(values), torch.cat(targets))


# Not in inference mode: of a sharded model, that would hold in training for weights gathered here.
@torch.no_grad()
def extract_features(
    encoder: Callable[[Mapping[str, Any]], Tensor],
    batches: Iterable[Mapping[str, Any]],
    prepare: Callable[[dict[str, Any]], Mapping[str, Any]],
    device: torch.device | str = 'cpu',
) -> LabelledFeatures:
    """Compute the features of all batches, for a look at a model that is being trained.

    Args:
        encoder: From a normalised batch to features.
        batches: Batches with ``image`` and ``label``, e.g. a data loader.
        prepare: What a data module does on the device: normalisation.
        device: Where to compute.

    Returns:
        Features and labels, on the CPU.

    Raises:
        ValueError: If there is no batch, or one without labels, or a label that cannot be one.
    """
    features, labels = [], []
    for batch in batches:
        if 'label' not in batch:
            raise ValueError(f'batches must have a label; this one has {sorted(batch)}')
        tensors = tensors_to(batch, device)
        features.append(encoder(prepare(tensors)).float().cpu())
        labels.append(class_labels(batch['label'].cpu(), 'the labelled data'))
    if not features:
        raise ValueError('no data to compute features of: the data loader gave no batch')
    return LabelledFeatures(torch.cat(features), torch.cat(labels))
