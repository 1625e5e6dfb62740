"""Overlapping windows over a scene, and blending what a model says about each.

All positions are in patches of the model, so the patch grid of every window is part of one patch
grid of the scene, and blending never resamples. Only the rows that unfinished windows reach are
held in memory.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Axis:
    """Windows along the rows or along the columns of a scene, in patches.

    Attributes:
        length: Patches that the scene has along this axis, the last one possibly not full.
        size: Patches of a window.
        starts: First patch of each window, increasing; the last window ends with the scene.
    """

    length: int
    size: int
    starts: tuple[int, ...]

    @classmethod
    def cover(cls, length: int, size: int, overlap: float) -> Self:
        """Spread windows evenly over a length.

        Args:
            length: Patches to cover.
            size: Patches of a window; a scene that is shorter gets one window of its own length.
            overlap: Least fraction of a window that the next one covers too, in [0, 1). Windows
                advance by at least one patch.

        Returns:
            The fewest windows that keep the overlap.
        """
        size = min(size, length)
        step = max(1, math.floor(size * (1 - overlap)))
        gaps = math.ceil((length - size) / step)
        starts = (*(i * (length - size) // gaps for i in range(gaps)), length - size)
        return cls(length, size, starts)

    @cached_property
    def weights(self) -> Floats:
        """Weight of each window at each of its patches, shape (windows, size).

        A raised cosine, highest amid the window, divided by the sum over all windows at that
        patch: the weights of a patch sum to 1.
        """
        cosine = np.sin(np.pi * (np.arange(self.size) + 0.5) / self.size) ** 2
        total = np.zeros(self.length)
        for start in self.starts:
            total[start : start + self.size] += cosine
        return np.stack([cosine / total[s : s + self.size] for s in self.starts]).astype(np.float32)


class Position(NamedTuple):
    """Index of a window: i-th along the rows, j-th along the columns."""

    i: int
    j: int


@dataclass(frozen=True)
class Tiling:
    """Windows over a scene, row by row.

    Attributes:
        rows: Windows along the rows.
        cols: Windows along the columns.
        patch_size: Pixels a patch.
        origin: Row and column of the scene at which the first patch begins, negative before it.
    """

    rows: Axis
    cols: Axis
    patch_size: int
    origin: tuple[int, int] = (0, 0)

    @classmethod
    def cover(
        cls, shape: tuple[int, int], patch_size: int, window: int = 224, overlap: float = 0.5
    ) -> Self:
        """Cover a scene with windows.

        Args:
            shape: Height and width of the scene in pixels. Where a side is not a multiple of the
                patch size, the last patches reach beyond the scene.
            patch_size: Pixels a patch.
            window: Side of a window in pixels. Along a side of the scene that is shorter, windows
                are as long as the scene.
            overlap: Least fraction of a window that the next one covers too, in [0, 1).

        Returns:
            The windows.

        Raises:
            ValueError: If the window is not a multiple of the patch size, or the overlap is out
                of range.
        """
        if window <= 0 or window % patch_size:
            raise ValueError(
                f"window={window} px is not a multiple of the model's patch size: try "
                f'{max(1, round(window / patch_size)) * patch_size}'
            )
        if not 0 <= overlap < 1:
            raise ValueError(f'overlap={overlap} is not a share in [0, 1)')
        rows, cols = (
            Axis.cover(math.ceil(side / patch_size), window // patch_size, overlap)
            for side in shape
        )
        return cls(rows, cols, patch_size)

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.rows.starts) * len(self.cols.starts)

    def __iter__(self) -> Iterator[Position]:
        """Windows, row by row."""
        for i in range(len(self.rows.starts)):
            for j in range(len(self.cols.starts)):
                yield Position(i, j)

    def pixels(self, position: Position) -> tuple[int, int, int, int]:
        """First row, first column, height and width of a window in pixels."""
        p = self.patch_size
        row, col = self.rows.starts[position.i] * p, self.cols.starts[position.j] * p
        top, left = self.origin
        return top + row, left + col, self.rows.size * p, self.cols.size * p


class Tile(NamedTuple):
    """What is known of one window.

    Attributes:
        position: The window.
        values: Values of its patches, shape (C, window rows, window columns).
        valid: Pixels that hold data, shape (window height, window width).
    """

    position: Position
    values: Floats
    valid: Mask


class Strip(NamedTuple):
    """Finished rows of a scene over its full width.

    Attributes:
        values: Values of the patches, shape (C, rows, columns); NaN where a patch has no valid
            pixel.
        valid: Pixels that hold data, shape (rows x patch size, columns x patch size).
    """

    values: Floats
    valid: Mask


class Sums(NamedTuple):
    """Weighted sums over the rows that both a row of windows and the next one reach.

    Attributes:
        values: Sums at the patches, shape (C, rows, columns).
        valid: Pixels that hold data, shape (rows x patch size, columns x patch size).
    """

    values: Floats
    valid: Mask


def blend_row(
    tiling: Tiling, i: int, tiles: Iterable[Tile], above: Sums | None, channels: int
) -> tuple[Strip, Sums]:
    """Average the windows of one row with those of the row above, by :attr:`Axis.weights`.

    Args:
        tiling: The windows.
        i: Row of windows.
        tiles: What is known of its windows. Those without valid pixels may be left out.
        above: What the row above left over; None for the first.
        channels: Values a patch.

    Returns:
        The rows of patches that no later window reaches, and what is left over for the next row of
        windows. No more rows than a window has are held.
    """
    rows, cols, p = tiling.rows, tiling.cols, tiling.patch_size
    values = np.zeros((channels, rows.size, cols.length), np.float32)
    valid = np.zeros((rows.size * p, cols.length * p), bool)
    if above is not None:
        shared = above.values.shape[1]
        values[:, :shared], valid[: shared * p] = above
    for position, tile_values, tile_valid in tiles:
        start = cols.starts[position.j]
        weights = rows.weights[i][:, None] * cols.weights[position.j]
        values[:, :, start : start + cols.size] += weights * tile_values
        valid[:, start * p : (start + cols.size) * p] = tile_valid
    last = i == len(rows.starts) - 1
    done = rows.size if last else rows.starts[i + 1] - rows.starts[i]
    return (
        _strip(values[:, :done], valid[: done * p], p),
        Sums(values[:, done:], valid[done * p :]),
    )


def _strip(values: Floats, valid: Mask, p: int) -> Strip:
    # In place: a copy of a row of windows of a large scene would be most of what is held.
    np.copyto(values, np.nan, where=~any_valid(valid, p))
    return Strip(values, valid)


def any_valid(valid: Mask, patch_size: int) -> Mask:
    """Which patches have a valid pixel.

    Args:
        valid: Pixels that hold data, shape (rows x patch size, columns x patch size).
        patch_size: Pixels a patch.

    Returns:
        Mask of shape (rows, columns).
    """
    rows, cols = valid.shape[0] // patch_size, valid.shape[1] // patch_size
    return valid.reshape(rows, patch_size, cols, patch_size).any(axis=(1, 3))


def regroup(strips: Iterable[Strip], rows: int) -> Iterator[Strip]:
    """Cut strips anew, to the height that a writer wants.

    Args:
        strips: Strips of any heights, from top to bottom.
        rows: Patch rows of the new strips; the last one may be shorter.

    Yields:
        Strips whose values have one row more above and one below, for interpolation: those of the
        neighbouring strips, and at the edges of the scene the nearest row again. The mask has no
        such rows.
    """
    values: Floats | None = None
    valid: Mask | None = None
    p = 1
    for strip in strips:
        if values is None or valid is None:
            p = len(strip.valid) // strip.values.shape[1]
            values, valid = np.concatenate([strip.values[:, :1], strip.values], 1), strip.valid
        else:
            values = np.concatenate([values, strip.values], axis=1)
            valid = np.concatenate([valid, strip.valid])
        while values.shape[1] >= rows + 2:
            yield Strip(values[:, : rows + 2], valid[: rows * p])
            values, valid = values[:, rows:], valid[rows * p :]
    if values is not None and valid is not None:
        yield Strip(np.concatenate([values, values[:, -1:]], axis=1), valid)
