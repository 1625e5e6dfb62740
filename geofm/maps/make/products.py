"""Attention and features of a backbone for a scene, as georeferenced rasters and tables."""

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
from geofm.datasets.memory import release_memory
from geofm.grid import Grid
from geofm.locking import locked_folder
from geofm.lonlat import pixel_in
from geofm.maps.make.embeddings import Precision, dimension_scales, write_embeddings
from geofm.maps.make.pca import PCABasis
from geofm.maps.make.segments import Segmenter, segment_colors
from geofm.maps.make.strides import ShiftedSurveys, Stride
from geofm.maps.make.survey import Observer, Wanted, architecture, open_survey, weights_sha256
from geofm.maps.make.tables import ALONE, Part, TableRun, run_table
from geofm.maps.make.windows import Strip, Tiling
from geofm.maps.make.writer import (
    Encoding,
    Upsampling,
    patch_grid,
    write_patches,
    write_pixels,
)
from geofm.maps.scene import (
    CACHE_BYTES,
    Imagery,
    Missing,
    Scene,
    TableScenes,
    files_by_sensor,
    option,
)
from geofm.models import has_cls_token
from geofm.printing import warn
from geofm.sensors import SENSORS, canonical_order
from geofm.transforms import InputStatistics

#: Products of a scene.
Product = Literal['attention', 'rollout', 'point', 'pca', 'segments', 'embedding']

_UNIT = 'relative to uniform attention over the patches of a window'


@dataclass(frozen=True)
class Options:
    """How products are made.

    Attributes:
        block: Block of the ViTs whose attention is shown. Negative numbers count from the last.
        window: Side of a window in pixels, a multiple of the patch size. The image size that the
            model was trained with is best.
        overlap: Minimum fraction of a window that overlaps with the next, in [0, 1).
        batch_size: Number of windows per forward pass.
        point: Longitude and latitude of the place whose attention 'point' shows.
        pixels: How patch values are brought to the pixels of the scene: the value of the pixel's
            patch ('nearest'), or interpolated between the centres of patches ('bilinear'; classes
            are never interpolated). None: one pixel per patch, or per stride. Embeddings always
            have one pixel per patch or stride.
        stride: Distance between values in pixels of the scene, a divisor of the patch size. Below
            the patch size, the model is run on patch grids shifted by the stride, which takes
            (patch size / stride)^2 times as long. None: the patch size.
        components: Number of principal components, at least 3.
        basis: File of a PCA basis to use instead of fitting one to the scene, e.g. the basis of a
            neighbouring scene.
        segments: Number of segments.
        seed: Seed of k-means.
        precision: Data type of the embeddings.
        missing_bands: Values for a band of the model that a raster lacks: its 'mean' or 'zero'.
            None: a missing band is an error.
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
    """Map the attention and the features of a backbone for a scene of any size.

    The scene is read in overlapping windows whose patches lie on one grid. Windows are blended with
    raised-cosine weights. All products are made in one pass over the windows. Memory does not grow
    with the scene. Finished windows are kept in a work folder beside the products until the
    products are complete, so that the same call resumes after a crash.

    Products are Cloud-Optimised GeoTIFFs with one pixel per patch. They have the origin and the CRS
    of the scene, which has the grid of one sensor: Sentinel-2 if it is given. If the sides of the
    scene are not multiples of the patch size, the last patches reach beyond it. A patch without a
    valid pixel is nodata.

    With a stride below the patch size, the side of a pixel is the stride, and the pixel lies in the
    middle of its patch. The raster begins half a pixel before the scene if the patch size is an
    even multiple of the stride. Every (patch size / stride)-th pixel along rows and columns has the
    same value as without a stride. A pixel is nodata if the area that it covers has no valid pixel.

    - ``attention``: CLS attention of a block. For each source (the sensors, and 'fusion' for
      cross-attention), the first band is the mean over the heads, followed by one band per head.
      Attention is multiplied by the number of patches of the window: 1 corresponds to uniform
      attention, for any window size.
    - ``rollout``: attention rollout (Abnar & Zuidema, 2020) of each sensor, in the same unit.
    - ``point``: attention of one patch, in one window around it; nodata elsewhere.
    - ``pca``: the first three principal components of the patch tokens as red, green and blue.
      Further files hold all components as numbers, the foreground by the first component, and the
      basis.
    - ``segments``: k-means clusters of the patch tokens.
    - ``embedding``: the patch tokens, as a raster with one band per dimension and as GeoParquet.

    Args:
        model: A :class:`geofm.models.MultiSensorViT`, a :class:`geofm.models.TimmViT`, or
            a module with their ``bands``, ``sensors``, ``patch_size``, ``depth``,
            ``num_prefix_tokens`` and ``observe``. It is put into evaluation mode.
        s1: Sentinel-1 raster of VV and VH in dB, or None.
        s2: Sentinel-2 raster in DN (reflectance x 10,000, without the offset of processing
            baseline 04.00), or None. The scale and offset of a raster are applied. A warning is
            issued if values seem to be in another unit.
        output: Folder of the products. It is created if it does not exist.
        products: Products to make. Default: all that the model supports, 'point' only if
            ``options.point`` is given.
        options: Options of the products.
        scene: Rasters of any sensors by key, e.g. ``{'s1': path, 'dem': path}``, in the units of
            the sensors.
        reference: Key of the sensor whose grid is used. Default: Sentinel-2 if it is given,
            otherwise the first sensor that is not static.
        dates: Days of acquisition as YYYY-MM-DD, by sensor. Default: from each file's name or
            metadata.
        names: Name of each band of a raster by sensor, for files without band descriptions.
        device: Device to run on. Default: the device of the model.
        command: Command to write to the tags of the files.

    Returns:
        The files ``<scene>_<product>.<suffix>`` by product. Products are those above,
        'pca_components', 'pca_basis', 'foreground' and 'embedding_table'.

    Raises:
        FileNotFoundError: If a file does not exist.
        LockedError: If another process is writing to the folder.
        ValueError: If a raster cannot be used (no CRS, missing bands, smaller than a patch), if the
            rasters do not overlap or have no data in common, if no sensor of the model is given, if
            the model does not support a product, or if an option is out of range.
    """
    options = options or Options()
    backbone: Any = model.eval() if device is None else model.to(device).eval()
    chosen = _choose(products, options, backbone)
    files = files_by_sensor(s1, s2, scene)
    with (
        locked_folder(output),
        rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES),
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
    """Map the attention and the features of a backbone for every scene of a table.

    See :func:`map_scene` for the products.

    Args:
        model: The backbone.
        scenes: The scenes, which must have all sensors of the backbone.
        output: Folder that contains the folders of the scenes.
        products: Products to make.
        options: Options of the products.
        device: Device to run on. Default: the device of the model.
        command: Command to write to the tags of the files.
        part: Which of the scenes this process maps.

    Returns:
        The result for the scenes of the part.
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
    """Make the products of a scene, or resume making them."""
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
    # The product 'point' alone needs no survey: it reads one window.
    if maker.survey.layout and maker.survey.is_empty():
        maker.survey.remove()
        names_of = ' and '.join(ground.tags()[key] for key in ground.days)
        raise ValueError('; '.join([f'{names_of}: no pixel has data in every band', *units]))
    made = maker.make(chosen)
    maker.survey.remove()
    return made


def _choose(
    products: Sequence[Product] | None, options: Options, model: nn.Module
) -> tuple[Product, ...]:
    """Return the products to make, in the order of :data:`Product`."""
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
            f'stride={stride.pixels} and pixels={options.pixels}: choose one; with a stride, '
            f'pixels have a side of {stride.pixels} px of the scene'
        )


def _report_sensors(scene: Scene, sensors: Sequence[str], files: Mapping[str, Path]) -> None:
    """Warn of missing sensors, of sensors that the model does not know, and of filled bands."""
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
        filling = 'their mean' if scene.missing == 'mean' else 'zeros'
        warn(f'no raster has the bands {", ".join(scene.filled)}: filled with {filling}')


@dataclass(frozen=True)
class _Maker:
    """Makes the products of a scene from a survey."""

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
        """Check the options, and open the work folder."""
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
        """Write the files of some products."""
        files: dict[str, Path] = {}
        for product in products:
            files |= getattr(self, f'_make_{product}')()
            release_memory()
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
        """Write the attention of a patch in the window around it."""
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
        """Return the band names of 'point', and its strips on the patch grid of one shift."""
        assert self.options.point is not None
        rows, cols, p = tiling.rows, tiling.cols, tiling.patch_size
        row, col = _patch_at(self.scene, p, self.options.point, tiling.origin)
        # A shifted patch grid may not cover the first or the last pixels of the scene.
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
        release_memory()

    @property
    def _cells(self) -> tuple[Grid, int]:
        """Grid of the pixels that a product covers, and the side of a value in these pixels."""
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
            f'{path}: PCA basis of another model: its weights are {basis.weights_sha256[:12]}, '
            f'those of this model {weights[:12]}'
        )
    return basis


def _patch_at(
    scene: Imagery, patch_size: int, point: tuple[float, float], origin: tuple[int, int] = (0, 0)
) -> tuple[int, int]:
    """Return the row and column of the patch at a longitude and latitude."""
    y, x = pixel_in(scene.grid, *point, scene.path)
    top, left = origin
    row, col = (y - top) // patch_size, (x - left) // patch_size
    corner = top + row * patch_size, left + col * patch_size
    patch = scene.read(*corner, patch_size, patch_size)
    if not patch['valid'].any():
        raise ValueError(f'{scene.path}: no data at the point {point[0]}, {point[1]}')
    return row, col
