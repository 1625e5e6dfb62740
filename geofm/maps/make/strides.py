"""Maps finer than the patches of a model, by interleaving patch grids shifted by a stride.

The model is run on the scene once per shift of its patch grid. The value of a patch is assigned to
a cell in its middle, whose side is the stride. The cells of all shifts together form
a regular grid: they are the pixels of the map.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from typing import Self

import numpy as np
from rasterio.transform import Affine
from rich.progress import Progress

from geofm.grid import Grid
from geofm.maps.make.survey import SceneModel, Survey
from geofm.maps.make.windows import Mask, Strip, Tiling, any_valid


@dataclass(frozen=True)
class Stride:
    """Shifts of a patch grid, and the cells in the middle of the shifted patches.

    Attributes:
        patch_size: Side of a patch in pixels.
        pixels: The stride: side of a cell in pixels of the scene.
    """

    patch_size: int
    pixels: int

    @classmethod
    def of(cls, patch_size: int, pixels: int | None) -> Self:
        """Create a stride.

        Args:
            patch_size: Side of a patch in pixels.
            pixels: The stride. None: the patch size.

        Returns:
            The stride.

        Raises:
            ValueError: If it does not divide the patch size.
        """
        pixels = patch_size if pixels is None else pixels
        if pixels < 1 or patch_size % pixels:
            fit = [size for size in range(1, patch_size + 1) if patch_size % size == 0]
            raise ValueError(
                f"stride={pixels} px does not divide the model's patch size of {patch_size} px: "
                f'choose one of {fit}'
            )
        return cls(patch_size, pixels)

    @property
    def factor(self) -> int:
        """Number of cells along a side of a patch."""
        return self.patch_size // self.pixels

    @property
    def origins(self) -> list[tuple[int, int]]:
        """Row and column where the patch grid of each shift begins. They include (0, 0)."""
        starts = [self.pixels * (i - self.factor // 2) for i in range(self.factor)]
        return list(product(starts, starts))

    def covered(self, grid: Grid) -> Grid:
        """Return the pixels of all cells of a scene.

        Their :func:`~geofm.maps.make.writer.patch_grid` is the grid of the cells.

        Args:
            grid: Grid of the scene.

        Returns:
            A grid with pixels of the same size. If the number of cells along a patch is even, it
            begins half a cell before the scene, so that cells lie in the middle of patches.
        """
        p, s = self.patch_size, self.pixels
        start = (p - s) / 2 - s * (self.factor // 2)
        height, width = (
            min(math.ceil(side / p) * p, math.ceil(side - start)) for side in grid.shape
        )
        transform = grid.transform @ Affine.translation(start, start)
        return replace(grid, transform=transform, height=height, width=width)

    def interleave(self, shifted: Sequence[Strip]) -> Strip:
        """Interleave the same rows of patches of all shifts.

        Args:
            shifted: A strip of each shift, in the order of :attr:`origins`.

        Returns:
            Values of the cells, NaN where a cell has no valid pixel, and the mask of valid pixels
            of the cells.
        """
        if len(shifted) == 1:
            return shifted[0]
        k = self.factor
        values = np.stack([strip.values for strip in shifted])
        channels, rows, cols = values.shape[1:]
        values = values.reshape(k, k, channels, rows, cols).transpose(2, 3, 0, 4, 1)
        valid = np.stack([self._middle(strip.valid) for strip in shifted])
        valid = valid.reshape(k, k, rows, self.pixels, cols, self.pixels)
        valid = valid.transpose(2, 0, 3, 4, 1, 5).reshape(rows * self.patch_size, -1)
        cells = values.reshape(channels, rows * k, cols * k)
        return Strip(np.where(any_valid(valid, self.pixels), cells, np.float32(np.nan)), valid)

    def _middle(self, valid: Mask) -> Mask:
        """Return which pixels are valid in the centre cell of each patch.

        The cell has a side of one stride. The mask has shape (rows, stride, columns, stride).

        If the edges of a cell lie between pixels, partly covered pixels count as well.
        """
        p, s = self.patch_size, self.pixels
        first = (p - s) // 2
        starts = range(first, first + 1 + (p - s) % 2)
        patches = valid.reshape(len(valid) // p, p, -1, p)
        parts = (patches[:, r : r + s, :, c : c + s] for r, c in product(starts, starts))
        return reduce(np.logical_or, parts)


@dataclass(frozen=True)
class ShiftedSurveys:
    """Values of the patches of a scene (:class:`Survey`) for all shifts of the patch grid.

    Attributes:
        stride: The shifts.
        surveys: Survey of each shift, in the order of :attr:`Stride.origins`.
        grid: Grid of the scene.
    """

    stride: Stride
    surveys: Sequence[Survey]
    grid: Grid

    @property
    def layout(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the values of a cell, by kind: the keys that :meth:`strips` accepts."""
        return self.surveys[0].layout

    @property
    def tilings(self) -> list[Tiling]:
        """Windows of each shift."""
        return [survey.tiling for survey in self.surveys]

    @property
    def count(self) -> int:
        """Number of strips."""
        return (
            self.surveys[0].tiling.rows.length if len(self.surveys) > 1 else self.surveys[0].count
        )

    def strips(self, kind: str) -> Iterator[Strip]:
        """Read the values of one kind for all cells, see :meth:`Survey.strips`.

        Args:
            kind: A key of the layout.

        Yields:
            Strips from top to bottom.
        """
        # One row of patches of every shift needs about the memory of a strip of a single survey.
        most_rows = 1 if len(self.surveys) > 1 else None
        parts = (survey.strips(kind, most_rows) for survey in self.surveys)
        return self.join(zip(*parts, strict=True))

    def join(self, shifted: Iterable[Sequence[Strip]]) -> Iterator[Strip]:
        """Interleave strips, and crop them to the scene.

        Args:
            shifted: A strip of each shift, repeatedly from top to bottom.

        Yields:
            Strips of the cells.
        """
        s, covered = self.stride.pixels, self.stride.covered(self.grid)
        left, width = (math.ceil(side / s) for side in covered.shape)
        for strip in map(self.stride.interleave, shifted):
            rows = min(left, strip.values.shape[1])
            if rows:
                yield Strip(strip.values[:, :rows, :width], strip.valid[: rows * s, : width * s])
            left -= rows

    def run(self, observer: SceneModel, batch_size: int, progress: Progress) -> None:
        """Process all unfinished windows, see :meth:`Survey.run`."""
        total = sum(len(survey.tiling) for survey in self.surveys)
        done = sum(survey.done() for survey in self.surveys)
        task = progress.add_task('Windows', total=total, completed=done)
        for survey in self.surveys:
            survey.run(observer, batch_size, progress, task)

    def is_empty(self) -> bool:
        """Whether no pixel of the scene has data."""
        return all(survey.is_empty() for survey in self.surveys)

    def remove(self) -> None:
        """Remove the work folders."""
        for survey in self.surveys:
            survey.remove()
        if len(self.surveys) > 1:
            self.surveys[0].folder.parent.rmdir()
