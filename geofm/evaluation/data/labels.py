"""Checks of labels and masks before training and evaluation."""

import torch
from torch import Tensor

#: Maximum value of a class in a mask. Higher values are probably nodata values.
HIGHEST_CLASS = 255

#: Distance of the highest value from the others above which it is probably not a class, if it is
#: also more than 4 times the largest distance between the others.
_ISOLATED = 32


def class_labels(label: Tensor, source: str) -> Tensor:
    """Check the labels of a batch.

    Args:
        label: Labels of a batch: classes (B,) or (B, 1), or 0 and 1 (B, C) of multi-label data.
        source: Name of the data set in messages.

    Returns:
        Classes int64 (B,), or 0 and 1 int64 (B, C).

    Raises:
        ValueError: If labels have another shape, are not integers, are negative, or, for
            multi-label data, are not 0 or 1.
    """
    if label.is_floating_point() or label.ndim not in (1, 2):
        raise ValueError(
            f'{source}: labels of shape {tuple(label.shape)} and {label.dtype}: an integer class '
            'per image is needed, or 0 and 1 per class'
        )
    label = label.long()
    if label.ndim == 2 and label.shape[1] == 1:
        label = label[:, 0]
    if label.ndim == 2:
        wrong = label[(label != 0) & (label != 1)]
        if len(wrong):
            raise ValueError(
                f'{source}: label {wrong[0].item()}: labels of multi-label data must be 0 or 1. '
                'Remove images with unknown labels'
            )
    elif len(label) and label.min() < 0:
        raise ValueError(
            f'{source}: label {label.min().item()} is not a class: classes are numbered from 0. '
            'Remove images without a label from the data set'
        )
    return label


def class_mask(mask: Tensor, ignore_index: int, source: str) -> Tensor:
    """Check the masks of a batch.

    Args:
        mask: Masks (B, H, W). Negative values are padding outside an image.
        ignore_index: Value of pixels that are ignored.
        source: Name of the data set in messages.

    Returns:
        Classes int64 (B, H, W), with *ignore_index* instead of padding.

    Raises:
        ValueError: If a value is too high for a class.
    """
    mask = mask.long()
    mask = mask.masked_fill(mask < 0, ignore_index)
    counted = mask[mask != ignore_index]
    if counted.numel() and counted.max() > HIGHEST_CLASS:
        raise ValueError(
            f'{source}: masks have the value {counted.max().item()}, which is probably not a '
            'class. If it means no data, set ignore_index to it'
        )
    return mask


def number_of_classes(values: Tensor, named: int, source: str, advice: str, trust: bool) -> int:
    """Return the number of classes of labels or masks.

    Args:
        values: Classes that occur, without ignored pixels.
        named: Number of classes that have a name; 0 if the names are unknown.
        source: Name of the data set in messages.
        advice: Advice for a value that is probably not a class.
        trust: Whether a value far above all others is accepted as a class.

    Returns:
        One more than the highest class, or *named* if that is more.

    Raises:
        ValueError: If there are less than two classes, or if a value is probably not a class.
    """
    seen = values.unique()
    if len(seen) < 2:
        raise ValueError(
            f'{source}: all labels are {seen.tolist()}: at least two classes are needed'
        )
    highest = int(seen[-1])
    # Some data sets number their named classes from 1.
    if named and highest > named:
        raise ValueError(
            f'{source}: a label of {highest}, but only {named} classes have names. {advice}'
        )
    if not trust and not named:
        gaps = seen.diff(prepend=torch.zeros(1, dtype=seen.dtype))
        last, others = int(gaps[-1]), int(gaps[:-1].max())
        if last > _ISOLATED and last > 4 * others:
            raise ValueError(
                f'{source}: a label of {highest}, far above all others (up to '
                f'{int(seen[-2])}), is probably not a class. {advice}'
            )
    return max(highest + 1, named)
