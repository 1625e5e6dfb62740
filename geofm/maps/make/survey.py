"""One pass of a model over a scene: values of every patch, stored on disk.

Windows are read, passed to the model and blended row by row. Finished rows are written to a work
folder immediately, so that memory does not grow with the scene, and a run that was killed can be
resumed.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, batched, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from torch.utils.data import default_collate

from geofm.atomic import atomic_file, write_atomically
from geofm.datasets.memory import release_memory
from geofm.maps.make.windows import Floats, Mask, Position, Strip, Sums, Tile, Tiling, blend_row
from geofm.maps.scene import Imagery
from geofm.models import TokensAndAttention
from geofm.models.checkpoints import hash_tensors
from geofm.transforms import NO_STATISTICS, InputStatistics

_MANIFEST = 'manifest.json'


class SceneModel(Protocol):
    """Interface of a model applied to a scene, for :class:`Survey`.

    Attributes:
        scene: The scene.
        blended: Number of values per patch that are averaged over overlapping windows. None: as
            many as are stored, so that :meth:`finish` does not change their number.
    """

    @property
    def scene(self) -> Imagery:
        """The scene."""

    @property
    def blended(self) -> int | None:
        """Number of values per patch that are blended over windows; None: all that are stored."""

    def values(self, samples: Mapping[str, Tensor]) -> Floats:
        """Return the values of the patches of windows, of shape (windows, C, rows, columns)."""

    def finish(self, values: Floats) -> npt.NDArray[Any]:
        """Convert averaged values (C, rows, columns), NaN without data, to what is kept."""


@dataclass(frozen=True)
class Wanted:
    """The values of each patch that are kept.

    Attributes:
        block: Block whose CLS attention is kept. Negative numbers count from the last. None: no
            attention.
        rollout: Whether attention rollout is kept.
        tokens: Whether patch tokens are kept.
    """

    block: int | None = None
    rollout: bool = False
    tokens: bool = False


class Observer:
    """Tokens and attention of a model for the windows of a scene.

    Args:
        model: A :class:`geofm.models.MultiSensorViT`, a :class:`geofm.models.TimmViT`, or
            a module with their ``bands``, ``sensors``, ``patch_size``, ``num_prefix_tokens``
            and ``observe``, in evaluation mode. If it has ``statistics``, the input is normalised
            by them.
        scene: The scene.
        wanted: The values that are kept.
    """

    blended: int | None = None

    def __init__(self, model: nn.Module, scene: Imagery, wanted: Wanted) -> None:
        backbone: Any = model
        self.model = backbone
        self.scene = scene
        self.wanted = wanted
        sensors: tuple[str, ...] = backbone.sensors
        statistics: InputStatistics | None = getattr(backbone, 'statistics', None)
        self.normalize = (statistics or NO_STATISTICS).normalize(scene.bands)
        self.device = next(model.parameters()).device
        absent = scene.absent
        here = [key not in absent for key in sensors]
        # The model also returns attention to the placeholder pixels of a missing sensor.
        self._absent = {key for key in sensors if key in absent}
        self._present = torch.tensor([here], device=self.device) if self._absent else None

    def finish(self, values: Floats) -> Floats:
        """Return averaged values unchanged.

        Args:
            values: Averaged values (C, rows, columns).

        Returns:
            The same values.
        """
        return values

    def observe(
        self, samples: Mapping[str, Tensor], query: int | None = None
    ) -> TokensAndAttention:
        """Run the model on windows.

        Args:
            samples: Collated samples of :meth:`Scene.read`.
            query: Index of the patch, counted row by row, whose attention is returned. None:
                attention of the CLS token.

        Returns:
            Tokens and attention, without the attention to missing sensors.

        Raises:
            ValueError: If a token is not finite.
        """
        size = len(samples['image'])
        with torch.inference_mode():
            inputs = self.normalize({key: v.to(self.device) for key, v in samples.items()})
            # The mean of a band is 0 after normalisation.
            inputs['image'][:, self.scene.at_mean] = 0
            seen: TokensAndAttention = self.model.observe(
                inputs['image'],
                inputs['dates'],
                None if self._present is None else self._present.expand(size, -1),
                block=self.wanted.block,
                query=None if query is None else torch.full((size,), query, device=self.device),
                rollout=self.wanted.rollout,
            )
        # Prefix tokens are in no product.
        if not seen.tokens[:, self.model.num_prefix_tokens :].isfinite().all():
            raise ValueError(
                'features are not finite: the weights of the model diverged or are damaged; use an '
                'earlier checkpoint'
            )
        attention, rollout = (
            {key: value for key, value in maps.items() if key not in self._absent}
            for maps in (seen.attention, seen.rollout)
        )
        return TokensAndAttention(seen.tokens, attention, rollout)

    def values(self, samples: Mapping[str, Tensor]) -> Floats:
        """Compute the values of the patches of windows, in the order of :meth:`layout`.

        Attention and rollout are multiplied by the number of patches of the window: 1 corresponds
        to uniform attention, for any window size.

        Args:
            samples: Collated samples of :meth:`Scene.read`.

        Returns:
            Values of shape (windows, C, rows, columns).
        """
        seen = self.observe(samples)
        p = self.model.patch_size
        rows, cols = (side // p for side in samples['image'].shape[-2:])
        parts = [
            rows * cols * part
            for maps in seen.attention.values()
            for part in (maps.mean(dim=1, keepdim=True), maps)
        ]
        parts += [rows * cols * maps[:, None] for maps in seen.rollout.values()]
        if self.wanted.tokens:
            patches = seen.tokens[:, self.model.num_prefix_tokens :]
            parts.append(patches.mT.unflatten(2, (rows, cols)))
        return torch.cat([part.float() for part in parts], dim=1).cpu().numpy()

    def layout(self, height: int, width: int) -> dict[str, tuple[str, ...]]:
        """Describe the values of a patch, by running the model on an empty window.

        Args:
            height: Height of the windows in pixels.
            width: Width of the windows in pixels.

        Returns:
            Descriptions of the values by kind: 'attention', 'rollout' and 'tokens'.
        """
        seen = self.observe(
            {
                'image': torch.zeros(1, len(self.scene.bands), height, width),
                'dates': self.scene.dates[None],
            }
        )
        layout = {}
        if seen.attention:
            layout['attention'] = tuple(
                f'{self.where(source)} {what}'
                for source, maps in seen.attention.items()
                for what in ('mean', *(f'head {head}' for head in range(maps.shape[1])))
            )
        if seen.rollout:
            layout['rollout'] = tuple(f'{source} rollout' for source in seen.rollout)
        if self.wanted.tokens:
            layout['tokens'] = tuple(f'dimension {i}' for i in range(seen.tokens.shape[-1]))
        return layout

    def where(self, source: str) -> str:
        """Return the label of an attention map, such as 's1 block 5' or 'fusion last layer'."""
        block = (self.wanted.block or 0) % self.model.depth
        return f'{source} last layer' if source.startswith('fusion') else f'{source} block {block}'


@dataclass(frozen=True)
class Survey:
    """Values of a scene's patches, stored in a work folder.

    Attributes:
        folder: The work folder.
        tiling: Windows of the scene.
        layout: Descriptions of the values of a patch, by kind.
    """

    folder: Path
    tiling: Tiling
    layout: Mapping[str, tuple[str, ...]]

    @property
    def count(self) -> int:
        """Number of strips."""
        return len(self.tiling.rows.starts)

    def strips(self, kind: str, most_rows: int | None = None) -> Iterator[Strip]:
        """Read the values of one kind.

        Args:
            kind: A key of the layout.
            most_rows: Maximum number of rows of patches per strip. None: one strip per row of
                windows.

        Yields:
            Strips from top to bottom.
        """
        ends = accumulate((len(names) for names in self.layout.values()), initial=0)
        parts = dict(zip(self.layout, pairwise(ends), strict=True))
        first, last = parts[kind]
        p = self.tiling.patch_size
        for i in range(self.count):
            values, valid = np.load(self._strip(i), mmap_mode='r'), self._valid(i)
            step = most_rows or values.shape[1]
            for top in range(0, values.shape[1], step):
                rows = slice(top, top + step)
                yield Strip(np.array(values[first:last, rows]), valid[top * p : (top + step) * p])

    def is_empty(self) -> bool:
        """Whether no pixel of the scene has data."""
        return not any(self._valid(i).any() for i in range(self.count))

    # -- files of the work folder ---------------------------------------------------------------

    def _strip(self, i: int) -> Path:
        return self.folder / f'strip_{i:05}.npy'

    def _sums(self, i: int) -> Path:
        return self.folder / f'sums_{i:05}.npz'

    def _batches(self, i: int) -> list[Path]:
        return sorted(self.folder.glob(f'windows_{i:05}_*.npz'))

    def _valid(self, i: int) -> Mask:
        with np.load(self.folder / f'valid_{i:05}.npz') as file:
            return _unpack(file['bits'], file['shape'])

    def done(self) -> int:
        """Return the number of finished windows."""
        cols = len(self.tiling.cols.starts)
        strips = sum(self._strip(i).exists() for i in range(self.count))
        if strips == self.count:
            return strips * cols
        return strips * cols + sum(len(_columns(path)) for path in self._batches(strips))

    def run(
        self, observer: SceneModel, batch_size: int, progress: Progress, task: TaskID | None = None
    ) -> None:
        """Process all unfinished windows.

        Args:
            observer: The model and the scene, e.g. an :class:`Observer`.
            batch_size: Number of windows per forward pass.
            progress: Progress bars to add to.
            task: Bar that each window advances. None: a new bar.
        """
        if task is None:
            task = progress.add_task('Windows', total=len(self.tiling), completed=self.done())
        channels = observer.blended or sum(len(names) for names in self.layout.values())
        for i in range(self.count):
            if self._strip(i).exists():
                continue
            above = None
            if i:
                with np.load(self._sums(i - 1)) as file:
                    above = Sums(file['values'], _unpack(file['bits'], file['shape']))
            batches = self._batches(i)
            seen = {j for path in batches for j in _columns(path)}
            todo = [j for j in range(len(self.tiling.cols.starts)) if j not in seen]
            for columns in batched(todo, batch_size):
                path = self.folder / f'windows_{i:05}_{columns[0]:05}.npz'
                self._process(observer, i, columns, path)
                batches.append(path)
                # Blocks of GDAL's cache and tensors alternate in the heap of glibc: without this,
                # it grows threefold over a large scene.
                release_memory()
                progress.advance(task, len(columns))
            strip, sums = blend_row(
                self.tiling, i, _tiles(i, batches, self.tiling), above, channels
            )
            # In this order: if the strip exists, everything that the next row needs exists.
            _save(self._sums(i), values=sums.values, **_pack(sums.valid))
            _save(self.folder / f'valid_{i:05}.npz', **_pack(strip.valid))
            with atomic_file(self._strip(i)) as part:
                np.save(part, observer.finish(strip.values))
            for path in (*batches, self._sums(i - 1)):
                path.unlink(missing_ok=True)

    def _process(self, observer: SceneModel, i: int, columns: Sequence[int], path: Path) -> None:
        """Process some windows of a row, and store their values."""
        windows = dict(zip(columns, self._read(observer.scene, i, columns), strict=True))
        # Windows without data are not passed to the model.
        here = [j for j, sample in windows.items() if sample['valid'].any()]
        samples = [windows[j] for j in here]
        values = observer.values(default_collate(samples)) if samples else np.empty(0, np.float32)
        valid = [sample['valid'].numpy() for sample in samples]
        bits = np.stack([np.packbits(mask) for mask in valid]) if valid else np.empty(0, np.uint8)
        _save(path, columns=np.array(columns), here=np.array(here), values=values, bits=bits)

    def _read(self, scene: Imagery, i: int, columns: Sequence[int]) -> list[dict[str, Tensor]]:
        """Read windows of a row. The pixels that they share are read once."""
        boxes = [self.tiling.pixels(Position(i, j)) for j in columns]
        row, left, height, width = boxes[0]
        ground = scene.read(row, left, height, boxes[-1][1] + width - left)
        return [
            {
                'image': ground['image'][..., col - left : col - left + width],
                'valid': ground['valid'][..., col - left : col - left + width],
                'dates': ground['dates'],
            }
            for _, col, _, _ in boxes
        ]

    def remove(self) -> None:
        """Remove the work folder."""
        # Before the others: a work folder without a manifest is not resumed.
        (self.folder / _MANIFEST).unlink()
        shutil.rmtree(self.folder)


def open_survey(
    folder: Path, tiling: Tiling, layout: Mapping[str, tuple[str, ...]], manifest: Mapping[str, Any]
) -> Survey:
    """Open a work folder to start or to resume a survey.

    Args:
        folder: The folder. It is created if it does not exist, and emptied if its manifest differs.
        tiling: Windows of the scene.
        layout: Descriptions of the values of a patch, by kind.
        manifest: Everything that the values depend on, as data for JSON.

    Returns:
        The survey, which may be partly finished.
    """
    text = json.dumps({**manifest, 'layout': {k: len(v) for k, v in layout.items()}}, indent=1)
    path = folder / _MANIFEST
    if not path.exists() or path.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(path, text)
    return Survey(folder, tiling, layout)


def weights_sha256(model: nn.Module) -> str:
    """Hash of a model's weights, equal for all maps of the same model.

    Args:
        model: The model.

    Returns:
        SHA-256 over the names and values of its parameters and buffers.
    """
    return hash_tensors(model.state_dict())


def architecture(model: nn.Module) -> str:
    """Return the name of a model's architecture.

    Args:
        model: The model.

    Returns:
        Its name in timm if it has one, otherwise the name of its class.
    """
    config = getattr(model, 'pretrained_cfg', None) or {}
    return config.get('architecture') or type(model).__name__


def _tiles(i: int, batches: Iterable[Path], tiling: Tiling) -> Iterator[Tile]:
    """Read the stored windows of a row."""
    shape = tiling.rows.size * tiling.patch_size, tiling.cols.size * tiling.patch_size
    for path in batches:
        with np.load(path) as file:
            columns, values, bits = file['here'], file['values'], file['bits']
        for k, j in enumerate(columns):
            yield Tile(Position(i, int(j)), values[k], _unpack(bits[k], shape))


def _columns(path: Path) -> list[int]:
    with np.load(path) as file:
        return file['columns'].tolist()


def _pack(valid: Mask) -> dict[str, npt.NDArray[np.generic]]:
    return {'bits': np.packbits(valid), 'shape': np.array(valid.shape)}


def _unpack(bits: npt.NDArray[np.uint8], shape: Iterable[int]) -> Mask:
    height, width = shape
    return np.unpackbits(bits, count=height * width).reshape(height, width).astype(bool)


def _save(path: Path, **arrays: Any) -> None:
    with atomic_file(path) as part:
        np.savez(part, **arrays)
