"""A linear head on frozen patch tokens, for maps of classes or values."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, one_hot

from geofm.evaluation.data import Split, Task
from geofm.evaluation.features import Features
from geofm.evaluation.metrics import Prediction, confusion, mean_iou, r2, regression_sums
from geofm.evaluation.probes.heads import Heads, train_heads

#: Learning rates that are compared on the validation split.
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)

#: Number of patches per step.
BATCH_SIZE = 1024

#: Number of maps that are predicted at once.
_MAPS = 32


def dense_probe(
    splits: Mapping[Split, Features],
    task: Task,
    classes: int,
    ignore_index: int,
    steps: int,
    seed: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    progress: bool = True,
) -> Prediction:
    """Train DINOv2's linear head, a linear layer on patch tokens, and predict the test split.

    The head is trained on the fractions of the classes in each patch, or on the mean of the values
    in each patch. If the output of a head is constant within each patch, this loss equals its
    cross-entropy or squared error over the pixels, up to a constant. Predictions are interpolated
    bilinearly to the pixels. The learning rate is chosen on the pixels of the validation split.

    Args:
        splits: Features (N, D, h, w) and maps (N, H, W) of the splits.
        task: 'segmentation' or 'regression'.
        classes: Number of classes; 1 for regression.
        ignore_index: Class of pixels that are ignored. For regression, NaN is ignored instead.
        steps: Number of steps.
        seed: Seed of the batches.
        learning_rates: Learning rates for a batch size of 256.
        progress: Whether to show a progress bar.

    Returns:
        Predicted maps of the test split.

    Raises:
        ValueError: If all pixels of the training maps are ignored.
    """
    train, val, test = splits['train'], splits['val'], splits['test']
    height, width = train.values.shape[-2:]
    targets, counted = patch_targets(train.targets, (height, width), task, classes, ignore_index)
    known = counted > 0
    if not known.any():
        raise ValueError(
            'all pixels of the training maps are ignored: check the masks and ignore_index'
        )
    targets, counted = targets[known], counted[known]
    features = train.values.movedim(1, -1).flatten(0, -2)[known]
    # Values are standardised for training, and the head is converted back.
    center, spread = torch.zeros(1), torch.ones(1)
    if task == 'regression':
        center, spread = targets.mean(dim=0), targets.std(dim=0, correction=0).clamp_min(1e-12)
    heads = train_heads(
        features,
        (targets - center) / spread,
        torch.ones(features.shape[1], len(learning_rates), dtype=torch.bool),
        learning_rates,
        'identity' if task == 'regression' else 'softmax',
        steps,
        BATCH_SIZE,
        torch.Generator().manual_seed(seed),
        counted,
        'linear head' if progress else None,
    )
    heads = Heads(heads.weight * spread, heads.bias * spread + center, heads.mean, heads.scale)
    quality = [
        _quality(_maps(heads, h, val, task), val.targets, task, classes, ignore_index)
        for h in range(len(learning_rates))
    ]
    best = int(np.argmax(quality))
    chosen = f'learning rate {learning_rates[best]:g}'
    return Prediction('linear', '', _maps(heads, best, test, task), chosen)


def patch_targets(
    maps: Tensor, grid: tuple[int, int], task: Task, classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Compute the targets of a linear head on patches from maps.

    Args:
        maps: Classes or values (N, H, W).
        grid: Numbers of rows h and columns w of patches.
        task: 'segmentation' or 'regression'.
        classes: Number of classes C; 1 for regression.
        ignore_index: Class of pixels that are ignored. For regression, NaN is ignored instead.

    Returns:
        Fractions of the classes, or the mean of the values, of shape (N h w, C), and the fraction
        of each patch that is not ignored, of shape (N h w,).
    """
    targets, counts = [], []
    for chunk in maps.split(_MAPS):
        if task == 'regression':
            known = chunk.isfinite()
            values = chunk.masked_fill(~known, 0.0)[:, None]
        else:
            known = chunk != ignore_index
            values = one_hot(chunk.masked_fill(~known, 0), classes).movedim(-1, 1).float()
        mean = adaptive_avg_pool2d(values * known[:, None], grid)
        count = adaptive_avg_pool2d(known[:, None].float(), grid)
        targets.append((mean / count.clamp_min(1e-12)).movedim(1, -1).flatten(0, -2))
        counts.append(count.flatten())
    return torch.cat(targets), torch.cat(counts)


def _maps(heads: Heads, head: int, split: Features, task: Task) -> Tensor:
    """Predict maps (N, H, W) with a head."""
    weight, bias = heads.head(head)
    maps = []
    for chunk in split.values.split(_MAPS):
        outputs = (chunk.movedim(1, -1) @ weight + bias).movedim(-1, 1)
        pixels = interpolate(outputs, split.targets.shape[-2:], mode='bilinear')
        maps.append(pixels[:, 0] if task == 'regression' else pixels.argmax(dim=1))
    return torch.cat(maps)


def _quality(maps: Tensor, targets: Tensor, task: Task, classes: int, ignore_index: int) -> float:
    """Return the mIoU or R2 of maps; minus infinity for values that are not finite."""
    if task == 'regression':
        value = r2(regression_sums(maps, targets).sum(dim=0)).item()
        return value if np.isfinite(value) else -np.inf
    return mean_iou(confusion(maps, targets, classes, ignore_index).sum(dim=0)).item()
