"""Checks of labels and masks, before anything is trained or scored on them."""

import torch
from torch import Tensor

#: Highest value of a mask that can be a class: masks of more than 8 bits hold a nodata value there.
HIGHEST_CLASS = 255

#: A highest value this far above the others, and several times as far as those are apart, is
#: hardly a class.
_ISOLATED = 32


def class_labels(label: Tensor, source: str) -> Tensor:
    """Labels of a batch in one form, checked.

    Args:
        label: Labels as a data set yields them: (B,) or (B, 1) classes, or (B, C) of 0 and 1.
        source: Data set that they are from.

    Returns:
        Classes int64 (B,), or 0 and 1 int64 (B, C).

    Raises:
        ValueError: If they are of another shape, not whole numbers, negative, or, of several labels
            an image, not 0 or 1.
    """
    if label.is_floating_point() or label.ndim not in (1, 2):
        raise ValueError(
            f'{source}: labels of shape {tuple(label.shape)} and {label.dtype}: a class number an '
            'image is needed, or 0 and 1 for each class'
        )
    label = label.long()
    if label.ndim == 2 and label.shape[1] == 1:
        label = label[:, 0]
    if label.ndim == 2:
        wrong = label[(label != 0) & (label != 1)]
        if len(wrong):
            raise ValueError(
                f'{source}: label {wrong[0].item()} where an image has several labels: each must '
                'be 0 or 1. Leave out images whose labels are not known'
            )
    elif len(label) and label.min() < 0:
        raise ValueError(
            f'{source}: label {label.min().item()} is no class: classes are numbered from 0. Leave '
            'images without a label out of the data set'
        )
    return label


def class_mask(mask: Tensor, ignore_index: int, source: str) -> Tensor:
    """Maps of classes in one form, checked.

    Args:
        mask: Maps (B, H, W). Negative values are the padding of windows beyond an image.
        ignore_index: Value that does not count.
        source: Data set that they are from.

    Returns:
        Classes int64 (B, H, W), *ignore_index* where nothing is known.

    Raises:
        ValueError: If a value is too high for a class.
    """
    mask = mask.long()
    mask = mask.masked_fill(mask < 0, ignore_index)
    counted = mask[mask != ignore_index]
    if counted.numel() and counted.max() > HIGHEST_CLASS:
        raise ValueError(
            f'{source}: masks hold the value {counted.max().item()}, which is hardly a class. '
            'If it means that nothing is known there, set ignore_index to it'
        )
    return mask


def number_of_classes(values: Tensor, named: int, source: str, advice: str, trust: bool) -> int:
    """Number of classes of labels or masks.

    Args:
        values: Classes that occur, without what does not count.
        named: Number of classes that have a name; 0 if none has.
        source: Data set that they are from.
        advice: What to do about a value that is no class.
        trust: Whether to take a value far above all others for a class.

    Returns:
        One more than the highest class, or *named* if that is more.

    Raises:
        ValueError: If there are less than two classes, or there is a value that is hardly a class.
    """
    seen = values.unique()
    if len(seen) < 2:
        raise ValueError(
            f'{source}: all labels are {seen.tolist()}: with less than two classes there is '
            'nothing to tell apart'
        )
    highest = int(seen[-1])
    # Some data sets number their named classes from 1.
    if named and highest > named:
        raise ValueError(
            f'{source}: a target of {highest}, but {named} classes have names. {advice}'
        )
    if not trust and not named:
        gaps = seen.diff(prepend=torch.zeros(1, dtype=seen.dtype))
        last, others = int(gaps[-1]), int(gaps[:-1].max())
        if last > _ISOLATED and last > 4 * others:
            raise ValueError(
                f'{source}: a target of {highest}, far above all others (up to '
                f'{int(seen[-2])}), is hardly a class. {advice}'
            )
    return max(highest + 1, named)
