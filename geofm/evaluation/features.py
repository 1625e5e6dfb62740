"""Features of labelled images: from a backbone, or plain statistics as a floor."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from geofm.models import MultiSensorViT

#: From a normalised batch to features of shape (B, D).
Encoder = Callable[[Mapping[str, Any]], Tensor]


class LabelledFeatures(NamedTuple):
    """Features and labels of a data set.

    Attributes:
        features: Float32 of shape (N, D).
        labels: Int64 of shape (N,), or (N, classes) where an image can have several.
    """

    features: Tensor
    labels: Tensor


def backbone_encoder(backbone: MultiSensorViT, pool: Literal['cls', 'patches'] = 'cls') -> Encoder:
    """Features of a geofm backbone.

    Args:
        backbone: The model, in evaluation mode.
        pool: The CLS token, or the mean of the patch tokens.

    Returns:
        The encoder. It tells the backbone the dates where the batch has them.
    """

    def encode(batch: Mapping[str, Any]) -> Tensor:
        tokens = backbone.forward_features(batch['image'], batch.get('dates'))
        if pool == 'cls':
            return tokens[:, 0]
        return tokens[:, backbone.num_prefix_tokens :].mean(dim=1)

    return encode


def band_statistics_encoder(batch: Mapping[str, Any]) -> Tensor:
    """Mean and standard deviation of every band over the valid pixels: a floor for any model.

    Args:
        batch: Normalised ``image`` of shape (B, C, H, W), and where known ``valid`` of shape
            (B, H, W).

    Returns:
        Features of shape (B, 2C).
    """
    image: Tensor = batch['image']
    valid = batch['valid'][:, None] if 'valid' in batch else torch.ones_like(image[:, :1])
    valid = valid.to(image.dtype)
    count = valid.sum(dim=(2, 3)).clamp_min(1)
    mean = (image * valid).sum(dim=(2, 3)) / count
    deviation = (image - mean[..., None, None]) * valid
    return torch.cat([mean, (deviation.square().sum(dim=(2, 3)) / count).sqrt()], dim=1)


@torch.inference_mode()
def extract_features(
    encoder: Encoder,
    batches: Iterable[Mapping[str, Any]],
    prepare: Callable[[dict[str, Any]], Mapping[str, Any]],
    device: torch.device | str = 'cpu',
    description: str | None = None,
) -> LabelledFeatures:
    """Compute the features of all batches.

    Args:
        encoder: From a normalised batch to features.
        batches: Batches with ``image`` and ``label``, e.g. a data loader.
        prepare: What a data module does on the device: normalisation.
        device: Where to compute.
        description: Text of a progress bar; None shows none.

    Returns:
        Features and labels, on the CPU.

    Raises:
        ValueError: If there is no batch, or one without labels.
    """
    features, labels = [], []
    if description is not None:
        batches = track(batches, description)
    for batch in batches:
        if 'label' not in batch:
            raise ValueError(f'batches must have a label; this one has {sorted(batch)}')
        tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        features.append(encoder(prepare(tensors)).float().cpu())
        labels.append(batch['label'])
    if not features:
        raise ValueError('no data to compute features of: the data loader gave no batch')
    return LabelledFeatures(torch.cat(features), torch.cat(labels))
