"""Overlapping windows over a scene, and blending the values of their patches.

All positions are in patches of the model. The patch grid of every window is part of one patch grid
of the scene, so blending never resamples. Only the rows that later windows also cover are held in
memory.
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
        length: Number of patches of the scene along this axis. The last one may reach beyond it.
        size: Number of patches of a window.
        starts: First patch of each window, increasing. The last window ends with the scene.
    """

    length: int
    size: int
    starts: tuple[int, ...]

    @classmethod
    def cover(cls, length: int, size: int, overlap: float) -> Self:
        """Spread windows evenly over a length.

        Args:
            length: Number of patches to cover.
            size: Number of patches of a window. A shorter scene gets one window of its length.
            overlap: Minimum fraction of a window that overlaps with the next, in [0, 1). Windows
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
        """Weight of each window at each of its patches, of shape (windows, size).

        The weight is a raised cosine, highest in the middle of the window. It is normalised so that
        the weights of all windows at a patch sum to 1.
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
        patch_size: Side of a patch in pixels.
        origin: Row and column of the scene where the first patch begins; negative if it begins
            before the scene.
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
            shape: Height and width of the scene in pixels. If a side is not a multiple of the
                patch size, the last patches reach beyond the scene.
            patch_size: Side of a patch in pixels.
            window: Side of a window in pixels. Along a shorter side of the scene, windows are as
                long as the scene.
            overlap: Minimum fraction of a window that overlaps with the next, in [0, 1).

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
            raise ValueError(f'overlap={overlap} is not a fraction in [0, 1)')
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
        """Return the first row, first column, height and width of a window in pixels."""
        p = self.patch_size
        row, col = self.rows.starts[position.i] * p, self.cols.starts[position.j] * p
        top, left = self.origin
        return top + row, left + col, self.rows.size * p, self.cols.size * p


class Tile(NamedTuple):
    """Values of the patches of one window.

    Attributes:
        position: The window.
        values: Values of the patches, of shape (C, window rows, window columns).
        valid: Mask of pixels with data, of shape (window height, window width).
    """

    position: Position
    values: Floats
    valid: Mask


class Strip(NamedTuple):
    """Finished rows of patches over the full width of a scene.

    Attributes:
        values: Values of the patches, of shape (C, rows, columns); NaN where a patch has no valid
            pixel.
        valid: Mask of pixels with data, of shape (rows x patch size, columns x patch size).
    """

    values: Floats
    valid: Mask


class Sums(NamedTuple):
    """Partial sums of the rows of patches that the next row of windows also covers.

    Attributes:
        values: Weighted sums at the patches, of shape (C, rows, columns).
        valid: Mask of pixels with data, of shape (rows x patch size, columns x patch size).
    """

    values: Floats
    valid: Mask


def blend_row(
    tiling: Tiling, i: int, tiles: Iterable[Tile], above: Sums | None, channels: int
) -> tuple[Strip, Sums]:
    """Blend the windows of one row with those of the row above, weighted by :attr:`Axis.weights`.

    Memory is needed for as many rows of patches as a window has.

    Args:
        tiling: The windows.
        i: Index of the row of windows.
        tiles: Values of the windows of the row. Windows without valid pixels may be left out.
        above: Partial sums from the row of windows above; None for the first row.
        channels: Number of values per patch.

    Returns:
        The rows of patches that no later window covers, and the partial sums for the next row of
        windows.
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
    # In place: a copy of a row of windows would double the memory of a large scene.
    np.copyto(values, np.nan, where=~any_valid(valid, p))
    return Strip(values, valid)


def any_valid(valid: Mask, patch_size: int) -> Mask:
    """Find the patches that have a valid pixel.

    Args:
        valid: Mask of pixels with data, of shape (rows x patch size, columns x patch size).
        patch_size: Side of a patch in pixels.

    Returns:
        Mask of patches, of shape (rows, columns).
    """
    rows, cols = valid.shape[0] // patch_size, valid.shape[1] // patch_size
    return valid.reshape(rows, patch_size, cols, patch_size).any(axis=(1, 3))


def regroup(strips: Iterable[Strip], rows: int) -> Iterator[Strip]:
    """Regroup strips into strips of another height.

    Args:
        strips: Strips of any heights, from top to bottom.
        rows: Rows of patches of the new strips. The last one may have fewer.

    Yields:
        Strips whose values have one additional row above and below, for interpolation: rows of the
        neighbouring strips, or copies of the outermost row at the edges of the scene. The mask has
        no additional rows.
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
