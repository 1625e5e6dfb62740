"""Token sequences of several sensors: CLS and registers once, then the patches of each sensor.

The token of sensor s at patch n of N is at index P + s N + n, after P prefix tokens. In packed
crops, the tokens of missing sensors are left out, so the length of a sequence depends on its
sensors.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from geofm.device import to_device
from geofm.models.packed import Kept


class SensorPatchEmbed(nn.ModuleDict):
    """Patch embeddings per sensor, as the patch embedding of timm's ``VisionTransformer``.

    Args:
        channels: Number of input channels of each sensor, by its key.
        in_chans: Not used; accepted for timm.
        kwargs: Arguments of timm's ``PatchEmbed``.
    """

    def __init__(self, channels: dict[str, int], in_chans: int = 0, **kwargs: Any) -> None:
        parts = {key: PatchEmbed(in_chans=count, **kwargs) for key, count in channels.items()}
        super().__init__(parts)
        first = next(iter(parts.values()))
        self.img_size = first.img_size
        self.patch_size = first.patch_size
        self.grid_size = first.grid_size
        self.num_patches = first.num_patches


class Group(NamedTuple):
    """Crops of a view that have the same sensors.

    Attributes:
        crops: Indices of the crops, int64 of shape (b,).
        sensors: Indices of the sensors that are present.
    """

    crops: Tensor
    sensors: tuple[int, ...]


def join(parts: Sequence[Tensor], prefix: int) -> Tensor:
    """Join the sequences of several sensors into one.

    Args:
        parts: Tokens of each sensor, of shape (B, P + N, D). The prefix tokens are the same for all
            sensors; those of the first are kept.
        prefix: Number P of prefix tokens.

    Returns:
        Tokens of shape (B, P + S N, D).
    """
    return torch.cat([parts[0], *(part[:, prefix:] for part in parts[1:])], dim=1)


def split(rows: Tensor, prefix: int, sensors: int) -> tuple[Tensor, ...]:
    """Split values that belong to the tokens of a sequence by sensor.

    Args:
        rows: Values of shape (..., P + S N).
        prefix: Number P of prefix tokens, whose values are dropped.
        sensors: Number S of sensors.

    Returns:
        Values of shape (..., N) for each sensor.
    """
    return rows[..., prefix:].chunk(sensors, dim=-1)


def sensor_weights(present: Tensor) -> Tensor:
    """Compute the weights of sensors in an average over those present.

    Args:
        present: Whether each sensor is present, bool of shape (B, S).

    Returns:
        Weights of shape (B, S) that sum to 1, or to 0 if no sensor is present.
    """
    return present / present.sum(dim=1, keepdim=True).clamp_min(1)


def average(tokens: Tensor, prefix: int, patches: int, present: Tensor) -> Tensor:
    """Average the patch tokens over the sensors that are present.

    Args:
        tokens: Tokens of shape (B, P + S N, D).
        prefix: Number P of prefix tokens.
        patches: Number N of patches of each sensor.
        present: Whether each sensor is present, bool of shape (B, S).

    Returns:
        Tokens of shape (B, P + N, D). Patch tokens are zero if no sensor is present.
    """
    head, of_patches = tokens.tensor_split([prefix], dim=1)
    by_sensor = of_patches.unflatten(1, (present.shape[1], patches))
    weights = sensor_weights(present).to(tokens.dtype)
    return torch.cat([head, (by_sensor * weights[:, :, None, None]).sum(dim=1)], dim=1)


def attention_mask(present: Tensor, prefix: int, patches: int) -> Tensor:
    """Make an attention mask that excludes the tokens of missing sensors.

    Args:
        present: Whether each sensor is present, bool of shape (B, S).
        prefix: Number P of prefix tokens.
        patches: Number N of patches of each sensor.

    Returns:
        Values to add to the attention logits, 0 or -inf, float32 of shape (B, 1, 1, P + S N).
    """
    seen = present[:, :, None].expand(-1, -1, patches).flatten(1)
    seen = torch.cat([seen.new_ones(seen.shape[0], prefix), seen], dim=1)
    mask = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)
    return mask[:, None, None]


def group(present: Tensor) -> list[Group]:
    """Group crops by their sensors.

    *present* is copied to the CPU, so the host waits for the GPU.

    Args:
        present: Whether each sensor is present, bool of shape (B, S).

    Returns:
        The groups, in order of their first crop.
    """
    by_pattern: dict[tuple[bool, ...], list[int]] = {}
    for crop, row in enumerate(present.tolist()):
        by_pattern.setdefault(tuple(row), []).append(crop)
    return [
        Group(
            to_device(torch.tensor(crops), present.device),
            tuple(i for i, there in enumerate(pattern) if there),
        )
        for pattern, crops in by_pattern.items()
    ]


def take_group(tokens: Tensor, prefix: int, sensors: int, part: Group) -> Tensor:
    """Select the sequences of a group, without the tokens of missing sensors.

    Args:
        tokens: Tokens of all crops, of shape (B, P + S N, D).
        prefix: Number P of prefix tokens.
        sensors: Number S of sensors.
        part: The group.

    Returns:
        Tokens of shape (b, P + s N, D) for s sensors that are present.
    """
    if len(part.crops) < len(tokens):
        tokens = tokens.index_select(0, part.crops)
    if len(part.sensors) == sensors:
        return tokens
    head, patches = tokens.tensor_split([prefix], dim=1)
    by_sensor = patches.chunk(sensors, dim=1)
    return torch.cat([head, *(by_sensor[i] for i in part.sensors)], dim=1)


def wanted_rows(
    kept: Kept, groups: Sequence[Group], present: Tensor, prefix: int, patches: int
) -> Kept:
    """Find the tokens that selected tokens, which are means over the sensors, are computed from.

    Args:
        kept: Selected tokens after averaging: the CLS token of each crop, then M patch tokens.
        groups: The groups of the crops. The returned indices number the crops in their order.
        present: Whether each sensor is present, bool of shape (B, S).
        prefix: Number P of prefix tokens.
        patches: Number N of patches of each sensor.

    Returns:
        B + M S tokens: CLS of each crop, then for each of the M patches the tokens of all sensors.
        CLS stands in for the token of a missing sensor.
    """
    order = torch.cat([part.crops for part in groups])
    position = torch.empty_like(order).index_copy_(
        0, order, torch.arange(len(order), device=order.device)
    )
    crops, places = kept.sequences[len(present) :], kept.tokens[len(present) :]
    # Tokens of missing sensors are left out, so the rank among present sensors gives the index.
    rank = present.cumsum(dim=1) - 1
    tokens = torch.where(present[crops], places[:, None] + patches * rank[crops], 0)
    sequences = position[crops].repeat_interleave(present.shape[1])
    return Kept(
        torch.cat([position[kept.sequences[: len(present)]], sequences]),
        torch.cat([kept.tokens[: len(present)], tokens.flatten()]),
    )


def average_rows(rows: Tensor, kept: Kept, present: Tensor) -> Tensor:
    """Average the selected tokens over the sensors that are present.

    Args:
        rows: Tokens in the order of :func:`wanted_rows`, of shape (B + M S, D).
        kept: Selected tokens of the averaged sequences.
        present: Whether each sensor is present, bool of shape (B, S).

    Returns:
        Tokens of shape (B + M, D).
    """
    crops, sensors = present.shape
    cls, of_patches = rows.tensor_split([crops])
    weights = sensor_weights(present)[kept.sequences[crops:]].to(rows.dtype)
    by_sensor = of_patches.unflatten(0, (-1, sensors))
    return torch.cat([cls, (by_sensor * weights[:, :, None]).sum(dim=1)])
