"""What a backbone sees of a scene, as rasters and tables that lie on it."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import rasterio
import torch
from rich.progress import Progress
from torch import nn
from torch.utils.data import default_collate

from geofm import __version__
from geofm.grid import Grid
from geofm.locking import locked_folder
from geofm.lonlat import bounds, describe, pixel_at
from geofm.maps.make.embeddings import Precision, dimension_scales, write_embeddings
from geofm.maps.make.pca import PCABasis
from geofm.maps.make.segments import Segmenter, segment_colors
from geofm.maps.make.strides import ShiftedSurveys, Stride
from geofm.maps.make.survey import (
    Observer,
    Wanted,
    architecture,
    open_survey,
    return_memory,
    weights_sha256,
)
from geofm.maps.make.tables import ALONE, Part, TableRun, run_table
from geofm.maps.make.windows import Strip, Tiling
from geofm.maps.make.writer import (
    Encoding,
    Upsampling,
    patch_grid,
    write_patches,
    write_pixels,
)
from geofm.maps.scene import Imagery, Missing, Scene, TableScenes, files_by_sensor, option
from geofm.models import has_cls_token
from geofm.printing import warn
from geofm.sensors import SENSORS, canonical_order
from geofm.transforms import InputStatistics

#: What can be made of a scene.
Product = Literal['attention', 'rollout', 'point', 'pca', 'segments', 'embedding']

# GDAL's default, a share of the machine's memory, is more than a row of windows needs.
_CACHE_BYTES = 256 * 2**20

_UNIT = 'relative to uniform attention over the patches of a window'


@dataclass(frozen=True)
class Options:
    """How products are made.

    Attributes:
        block: Block of the ViTs whose attention is shown; negative counts from the last.
        window: Side of a window in pixels, a multiple of the patch size. Best the image size that
            the model was trained with.
        overlap: Least fraction of a window that the next one covers too, in [0, 1).
        batch_size: Windows a forward pass.
        point: Longitude and latitude of the place whose attention 'point' shows.
        pixels: How to bring values to the pixels of the scene: that of the patch ('nearest') or
            interpolated between the centres of patches ('bilinear'; classes never are). None: one
            pixel a patch, or a stride. Embeddings always have that.
        stride: Pixels of the scene from one value to the next, which must divide the patch size.
            Below the patch size, the model is run on patch grids shifted by the stride, which
            takes (patch size / stride)^2 times as long. None: the patch size.
        components: Number of principal components, at least 3.
        basis: File of a PCA basis to use instead of the scene's own, e.g. of the scene beside it.
        segments: Number of segments.
        seed: Seed of k-means.
        precision: How embeddings are stored.
        missing_bands: What stands for a band of the model that a raster lacks: its 'mean' or
            'zero'; None: an error.
    """

    block: int = -1
    window: int = 224
    overlap: float = 0.5
    batch_size: int = 8
    point: tuple[float, float] | None = None
    pixels: Upsampling | None = None
    stride: int | None = None
    components: int = 3
    basis: Path | None = None
    segments: int = 8
    seed: int = 0
    precision: Precision = 'float32'
    missing_bands: Missing | None = None


def map_scene(
    model: nn.Module,
    s1: Path | None = None,
    s2: Path | None = None,
    output: Path = Path('maps'),
    products: Sequence[Product] | None = None,
    options: Options | None = None,
    *,
    scene: Mapping[str, Path | None] | None = None,
    reference: str | None = None,
    dates: Mapping[str, str] | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    device: torch.device | str | None = None,
    command: str = 'geofm.maps.map_scene',
) -> dict[str, Path]:
    """Map what a backbone sees of a scene of any size.

    The scene is read in overlapping windows whose patches lie on one grid, and windows are blended
    with a raised cosine. One pass over the windows gives all products. Memory does not grow with
    the scene; finished windows are kept in a work folder beside the products until these are
    whole, so the same call after a crash resumes there.

    Products are Cloud-Optimised GeoTIFFs of one pixel a patch, from the outer corner of the scene
    and in its CRS, on the grid of one sensor, of Sentinel-2 where it is given. Where a scene is not
    a whole number of patches the last ones reach beyond it. A patch without any valid pixel is
    nodata.

    With a stride below the patch size, a pixel is as large as the stride and lies amid its patch.
    The raster then begins half a pixel before the scene if the patch size is an even multiple of
    the stride. Every (patch size / stride)-th pixel along rows and columns has the value that it
    has without a stride. A pixel is nodata if its own ground has no valid pixel.

    - ``attention``: CLS attention of a block. For each source, the sensors and 'fusion' for
      cross-attention, a band holds the mean over the heads, followed by one band a head. Attention
      is a distribution over the tokens of a window, so it is multiplied by the number of patches:
      1 is what uniform attention would give to a patch, in any window.
    - ``rollout``: attention rollout (Abnar & Zuidema, 2020) of each sensor, in the same unit.
    - ``point``: attention of one patch, in one window around it; nodata elsewhere.
    - ``pca``: first three principal components of the patch tokens as red, green and blue, and
      files of all components as numbers, of the foreground by the first, and of the basis.
    - ``segments``: k-means of the patch tokens.
    - ``embedding``: the patch tokens, as a raster of one band a dimension and as GeoParquet.

    Args:
        model: A :class:`geofm.models.MultiSensorViT`, a :class:`geofm.models.timm_vit.TimmViT`, or
            a module with their ``bands``, ``sensors``, ``patch_size``, ``depth``,
            ``num_prefix_tokens`` and ``observe``. It is put into eval mode.
        s1: Sentinel-1 raster of VV and VH in dB, or None.
        s2: Sentinel-2 raster in DN (reflectance x 10,000, without the offset of processing
            baseline 04.00), or None. A scale and an offset that a raster states are applied; values
            that look like another unit are warned of.
        output: Folder of the products; made if it isn't there.
        products: What to make. Default: all that the model can, 'point' only if there is one.
        options: How to make it.
        scene: Rasters of any sensors by key, e.g. ``{'s1': path, 'dem': path}``, in their units.
        reference: Key of the sensor whose grid the products are on. Default: Sentinel-2 where it is
            given, else the first that is not static.
        dates: Days of acquisition as YYYY-MM-DD, by sensor. Default: from each file's name or
            metadata.
        names: Name of each band of a raster by sensor, where the file does not say.
        device: Device to run on. Default: where the model is.
        command: Command to note in the files.

    Returns:
        The files, named ``<scene>_<product>.<suffix>``, by product: those above, and
        'pca_components', 'pca_basis', 'foreground', 'embedding_table'.

    Raises:
        FileNotFoundError: If a file is missing.
        LockedError: If another process is writing to the folder.
        ValueError: If a raster is unfit (no CRS, bands missing, smaller than a patch), they do not
            overlap or hold no data together, no sensor of the model is given, the model cannot
            make a product, or an argument is out of range, such as the block.
    """
    options = options or Options()
    backbone: Any = model.eval() if device is None else model.to(device).eval()
    chosen = _choose(products, options, backbone)
    files = files_by_sensor(s1, s2, scene)
    with (
        locked_folder(output),
        rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES),
        Scene(
            backbone.bands,
            dates=dates,
            names=names,
            missing=options.missing_bands,
            files=files,
            reference=reference,
            sensors=backbone.sensors,
        ) as ground,
        Progress() as progress,
    ):
        _report_sensors(ground, backbone.sensors, files)
        return _map(backbone, ground, output, chosen, options, command, progress)


def map_table(
    model: nn.Module,
    scenes: TableScenes,
    output: Path,
    products: Sequence[Product] | None = None,
    options: Options | None = None,
    device: torch.device | str | None = None,
    command: str = 'geofm.maps.map_table',
    part: Part = ALONE,
) -> TableRun:
    """Map what a backbone sees of every scene of a table, see :func:`map_scene`.

    Args:
        model: The backbone.
        scenes: The scenes, which have all its sensors.
        output: Folder of a folder for each scene.
        products: What to make.
        options: How to make it.
        device: Device to run on. Default: where the model is.
        command: Command to note in the files.
        part: Which of the scenes this process maps.

    Returns:
        What became of the scenes.
    """
    options = options or Options()
    backbone: Any = model.eval() if device is None else model.to(device).eval()
    chosen = _choose(products, options, backbone)
    made_with = {
        'geofm': __version__,
        'model': architecture(backbone),
        'weights_sha256': weights_sha256(backbone),
        'products': chosen,
        'options': dataclasses.asdict(options),
    }

    def run(scene: Imagery, folder: Path, progress: Progress) -> dict[str, Path]:
        return _map(backbone, scene, folder, chosen, options, command, progress)

    def described(scene: Imagery) -> Mapping[str, Any]:
        return {**made_with, 'rasters': scene.describe()}

    return run_table(scenes, output, run, described, 'map', part)


def _map(
    backbone: Any,
    ground: Imagery,
    output: Path,
    chosen: Sequence[Product],
    options: Options,
    command: str,
    progress: Progress,
) -> dict[str, Path]:
    """Make the products of a scene, or resume that."""
    units = ground.check_units()
    if min(ground.grid.shape) < backbone.patch_size:
        height, width = ground.grid.shape
        raise ValueError(
            f'{ground.path}: {height} x {width} px is smaller than one patch of the model '
            f'({backbone.patch_size} px)'
        )
    maker = _Maker.start(backbone, ground, output, chosen, options, command, progress)
    if maker.survey.layout:
        maker.survey.run(maker.observer, options.batch_size, progress)
    # A point alone is seen in one window.
    if maker.survey.layout and maker.survey.is_empty():
        maker.survey.remove()
        names_of = ' and '.join(ground.tags()[key] for key in ground.days)
        raise ValueError('; '.join([f'{names_of}: no pixel holds data in every band', *units]))
    made = maker.make(chosen)
    maker.survey.remove()
    return made


def _choose(
    products: Sequence[Product] | None, options: Options, model: nn.Module
) -> tuple[Product, ...]:
    """The products to make, in their order."""
    every: tuple[Product, ...] = get_args(Product)
    if products is None:
        cls = has_cls_token(model)
        left_out = {'attention': not cls, 'rollout': not cls, 'point': options.point is None}
        return tuple(p for p in every if not left_out.get(p))
    if unknown := [p for p in products if p not in every]:
        raise ValueError(f'unknown products {unknown}: choose from {list(every)}')
    if not products:
        raise ValueError(f'no products: choose from {list(every)}')
    if 'point' in products and options.point is None:
        raise ValueError("the product 'point' needs a point: give its longitude and latitude")
    return tuple(p for p in every if p in products)


def _check(options: Options, depth: int, stride: Stride) -> None:
    if not -depth <= options.block < depth:
        raise ValueError(f'block {options.block}: the model has {depth} blocks')
    if options.batch_size < 1:
        raise ValueError(f'batch_size={options.batch_size} is not positive')
    if options.components < 3:
        raise ValueError(f'components={options.components}: a picture needs at least 3')
    if options.pixels is not None and stride.factor > 1:
        raise ValueError(
            f'stride={stride.pixels} and pixels={options.pixels}: choose one; with a stride, a '
            f'raster has one pixel per {stride.pixels} px of the scene'
        )


def _report_sensors(scene: Scene, sensors: Sequence[str], files: Mapping[str, Path]) -> None:
    """Warn of a sensor that the model knows and doesn't get, or gets and doesn't know."""
    for key in canonical_order([*sensors, *files]):
        title = SENSORS[key].title
        if key in sensors and key not in scene.rasters:
            warn(
                f"no {title} raster given ({option(key)}): the model's missing-sensor tokens take "
                'its place'
            )
        elif key in files and key not in scene.rasters:
            warn(f'{files[key]} is not used: the model has no {title} bands')
    if scene.filled:
        stand_in = 'their mean' if scene.missing == 'mean' else 'zeros'
        warn(f'no raster has the bands {", ".join(scene.filled)}: filled with {stand_in}')


@dataclass(frozen=True)
class _Maker:
    """Makes products out of a survey."""

    observer: Observer
    survey: ShiftedSurveys
    scene: Imagery
    stem: Path
    options: Options
    basis: PCABasis | None
    tags: Mapping[str, str]
    progress: Progress

    @classmethod
    def start(
        cls,
        model: Any,
        scene: Imagery,
        output: Path,
        products: Sequence[Product],
        options: Options,
        command: str,
        progress: Progress,
    ) -> '_Maker':
        """Check all that can be checked at once, and open the work folder."""
        stride = Stride.of(model.patch_size, options.stride)
        _check(options, model.depth, stride)
        weights = weights_sha256(model)
        basis = None if options.basis is None else _load_basis(options.basis, weights)
        if options.point is not None:
            for origin in stride.origins:
                _patch_at(scene, model.patch_size, options.point, origin)
        tiling = Tiling.cover(scene.grid.shape, model.patch_size, options.window, options.overlap)
        wanted = Wanted(
            options.block if 'attention' in products else None,
            'rollout' in products,
            not {'pca', 'segments', 'embedding'}.isdisjoint(products),
        )
        observer = Observer(model, scene, wanted)
        layout = observer.layout(*tiling.pixels(next(iter(tiling)))[2:])
        manifest = {
            'geofm': __version__,
            'model': architecture(model),
            'weights_sha256': weights,
            'block': wanted.block,
            'window': options.window,
            'overlap': options.overlap,
            'stride': stride.pixels,
            'kinds': {kind: len(names) for kind, names in layout.items()},
            'rasters': scene.describe(),
            'statistics': InputStatistics.of(observer.normalize).entry(),
            'missing_bands': options.missing_bands,
        }
        digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:8]
        folder = output / f'.{scene.stem}.{digest}.work'
        tags = {
            'TIFFTAG_SOFTWARE': f'geofm {__version__}',
            'model': architecture(model),
            'weights_sha256': weights,
            'input_statistics': json.dumps(manifest['statistics']),
            'window': str(options.window),
            'overlap': str(options.overlap),
            'stride': str(stride.pixels),
            'command': command,
            **scene.tags(),
        }
        surveys = [
            open_survey(
                folder if stride.factor == 1 else folder / '{}_{}'.format(*origin),
                replace(tiling, origin=origin),
                layout,
                manifest,
            )
            for origin in stride.origins
        ]
        return cls(
            observer,
            ShiftedSurveys(stride, surveys, scene.grid),
            scene,
            output / scene.stem,
            options,
            basis,
            tags,
            progress,
        )

    def make(self, products: Sequence[Product]) -> dict[str, Path]:
        """Write the files of products."""
        files: dict[str, Path] = {}
        for product in products:
            files |= getattr(self, f'_make_{product}')()
            return_memory()
        return files

    # -- attention ------------------------------------------------------------------------------

    def _make_attention(self) -> dict[str, Path]:
        names = self.survey.layout['attention']
        tags = {'block': self._block, 'unit': f'CLS attention {_UNIT}'}
        return self._raster('attention', names, self._strips('attention'), tags)

    def _make_rollout(self) -> dict[str, Path]:
        names = self.survey.layout['rollout']
        tags = {'block': f'0 to {self._block_of(-1)}', 'unit': f'attention rollout {_UNIT}'}
        return self._raster('rollout', names, self._strips('rollout'), tags)

    def _make_point(self) -> dict[str, Path]:
        """Attention of a patch in the window around it."""
        tags = {
            'block': self._block,
            'point': '{}, {}'.format(*(self.options.point or ())),
            'unit': f'attention of the patch at the point {_UNIT}',
        }
        names, first = self._point(self.survey.tilings[0])
        others = (self._point(tiling)[1] for tiling in self.survey.tilings[1:])
        strips = self.survey.join(zip(first, *others, strict=True))
        return self._raster('point', names, strips, tags)

    def _point(self, tiling: Tiling) -> tuple[list[str], Iterator[Strip]]:
        """What the bands of 'point' are, and its strips on the patch grid of one shift."""
        assert self.options.point is not None
        rows, cols, p = tiling.rows, tiling.cols, tiling.patch_size
        row, col = _patch_at(self.scene, p, self.options.point, tiling.origin)
        # A shifted patch grid leaves out the first or the last pixels of the scene.
        row, col = (min(max(i, 0), a.length - 1) for i, a in ((row, rows), (col, cols)))
        top = min(max(row - rows.size // 2, 0), rows.length - rows.size)
        left = min(max(col - cols.size // 2, 0), cols.length - cols.size)
        down, right = tiling.origin
        corner = down + top * p, right + left * p
        sample = self.scene.read(*corner, rows.size * p, cols.size * p)
        observer = Observer(self.observer.model, self.scene, Wanted(self.options.block))
        query = (row - top) * cols.size + col - left
        seen = observer.observe(default_collate([sample]), query)
        names, maps = [], []
        for source, values in seen.attention.items():
            where = observer.where(source)
            names += [f'{where} mean', *(f'{where} head {k}' for k in range(values.shape[1]))]
            relative = rows.size * cols.size * values[0].float().cpu().numpy()
            maps += [relative.mean(axis=0, keepdims=True), relative]
        stacked = np.concatenate(maps)
        valid = sample['valid'].numpy()

        def strips() -> Iterator[Strip]:
            for start in range(rows.length):
                strip = np.full((len(stacked), 1, cols.length), np.nan, np.float32)
                mask = np.zeros((p, cols.length * p), bool)
                if top <= start < top + rows.size:
                    k = start - top
                    strip[:, 0, left : left + cols.size] = stacked[:, k]
                    mask[:, left * p : (left + cols.size) * p] = valid[k * p : (k + 1) * p]
                yield Strip(strip, mask)

        return names, strips()

    # -- features -------------------------------------------------------------------------------

    def _make_pca(self) -> dict[str, Path]:
        basis = self.basis or PCABasis.fit(
            lambda: self._strips('tokens', 'Fitting PCA'),
            self.options.components,
            self.tags['weights_sha256'],
        )
        saved = self._path('pca', '.safetensors')
        basis.save(saved)
        count = len(basis.components)
        files = self._raster(
            'pca',
            [f'component {i} as {name}' for i, name in enumerate(('red', 'green', 'blue'))],
            basis.colors(self._strips('tokens', 'Writing PCA')),
            {'unit': 'standard deviations of the basis, -2 to 2 as 1 to 255', **self._last},
            Encoding('uint8', 0, rgb=True),
        )
        files |= self._raster(
            'pca_components',
            [f'component {i}' for i in range(count)],
            basis.project(self._strips('tokens', 'Writing components')),
            {'std': ', '.join(f'{value:.6g}' for value in basis.std), **self._last},
        )
        files |= self._raster(
            'foreground',
            ['foreground'],
            basis.foregrounds(self._strips('tokens', 'Writing foreground')),
            self._last,
            Encoding('uint8', 255, colors={0: (30, 30, 60), 1: (250, 200, 60)}),
        )
        return {**files, 'pca_basis': saved}

    def _make_segments(self) -> dict[str, Path]:
        grid = patch_grid(*self._cells)
        segmenter = Segmenter(
            lambda: self._strips('tokens', 'Clustering'),
            self.options.segments,
            grid.height * grid.width,
            self.options.seed,
        )
        return self._raster(
            'segments',
            ['segment'],
            segmenter.assign(self._strips('tokens', 'Writing segments')),
            {'segments': str(self.options.segments), 'seed': str(self.options.seed), **self._last},
            Encoding('uint8', 255, colors=segment_colors(self.options.segments)),
        )

    def _make_embedding(self) -> dict[str, Path]:
        precision, scales = self.options.precision, None
        if precision == 'int8':
            scales = dimension_scales(self._strips('tokens', 'Scaling')).tolist()
        encoding = Encoding(precision, -128 if scales else math.nan, scales)
        path = self._path('embedding')
        write_patches(
            path,
            *self._cells,
            self.survey.layout['tokens'],
            self._strips('tokens', 'Writing embedding'),
            {**self.tags, **self._last, 'product': 'embedding'},
            encoding,
        )
        table = self._path('embedding', '.parquet')
        write_embeddings(
            table,
            patch_grid(*self._cells),
            self._strips('tokens', 'Writing table'),
            precision=precision,
            scales=scales,
            dates=self.scene.days,
            tags={**self.tags, **self._last},
        )
        return {'embedding': path, 'embedding_table': table}

    # -- files ----------------------------------------------------------------------------------

    @property
    def _block(self) -> str:
        return self._block_of(self.options.block)

    @property
    def _last(self) -> dict[str, str]:
        """Tags of products of the final tokens."""
        return {'block': self._block_of(-1)}

    def _block_of(self, block: int) -> str:
        return str(block % self.observer.model.depth)

    def _strips(self, kind: str, doing: str | None = None) -> Iterator[Strip]:
        strips = self.survey.strips(kind)
        description = doing or f'Writing {kind}'
        yield from self.progress.track(strips, self.survey.count, description=description)
        return_memory()

    @property
    def _cells(self) -> tuple[Grid, int]:
        """Pixels that a product is of, and how many of them a value is of."""
        stride = self.survey.stride
        return stride.covered(self.scene.grid), stride.pixels

    def _path(self, product: str, suffix: str = '.tif') -> Path:
        return self.stem.with_name(f'{self.stem.name}_{product}{suffix}')

    def _raster(
        self,
        product: str,
        names: Sequence[str],
        strips: Iterable[Strip],
        tags: Mapping[str, str],
        encoding: Encoding | None = None,
    ) -> dict[str, Path]:
        path, pixels = self._path(product), self.options.pixels
        grid, p = self._cells
        tags = {**self.tags, **tags}
        if pixels is None:
            write_patches(path, grid, p, names, strips, tags, encoding)
        else:
            how = pixels if encoding is None or encoding.colors is None else 'nearest'
            tags = {**tags, 'upsampling': how}
            write_pixels(path, grid, p, names, strips, how, tags, encoding)
        return {product: path}


def _load_basis(path: Path, weights: str) -> PCABasis:
    basis = PCABasis.load(path)
    if basis.weights_sha256 != weights:
        raise ValueError(
            f'{path}: PCA basis of another model: weights {basis.weights_sha256[:12]}, but this '
            f'one has {weights[:12]}'
        )
    return basis


def _patch_at(
    scene: Imagery, patch_size: int, point: tuple[float, float], origin: tuple[int, int] = (0, 0)
) -> tuple[int, int]:
    """Row and column of the patch at a longitude and latitude."""
    y, x = pixel_at(scene.grid, *point)
    if not (0 <= y < scene.grid.height and 0 <= x < scene.grid.width):
        raise ValueError(
            f'{scene.path}: {point[0]}, {point[1]} is outside of the scene, which is at '
            f'{describe(bounds(scene.grid))}'
        )
    top, left = origin
    row, col = (int(y) - top) // patch_size, (int(x) - left) // patch_size
    corner = top + row * patch_size, left + col * patch_size
    patch = scene.read(*corner, patch_size, patch_size)
    if not patch['valid'].any():
        raise ValueError(f'{scene.path}: no data at the point {point[0]}, {point[1]}')
    return row, col
