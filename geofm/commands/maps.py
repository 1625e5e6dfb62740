"""Commands that map and draw the features of a backbone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from geofm.commands.tables_mapped import command_line, raise_failed, say_scenes
from geofm.locking import locked_folder
from geofm.maps import Options, Product, map_scene, plot_products, read_item, save_figure
from geofm.maps import search as search_embeddings
from geofm.maps.make import Part, map_table, own_device
from geofm.maps.scene import Missing, TableScenes, files_by_sensor
from geofm.maps.view import DRAWN, SearchResult
from geofm.messages import UsageError
from geofm.models import load_model
from geofm.printing import say
from geofm.rasters import Address
from geofm.sensors import reference_sensor as reference_of


def map_(
    checkpoint: Path,
    s1: Path | None = None,
    s2: Path | None = None,
    item: Path | None = None,
    output: Path = Path('maps'),
    products: list[Product] | None = None,
    block: int = -1,
    point: str | None = None,
    window: int = 224,
    overlap: float = 0.5,
    batch_size: int = 8,
    stride: int | None = None,
    pixels: Literal['nearest', 'bilinear'] | None = None,
    components: int = 3,
    basis: Path | None = None,
    segments: int = 8,
    precision: Literal['float32', 'float16', 'int8'] = 'float32',
    dates: dict[str, str] | None = None,
    missing_bands: Missing | None = None,
    model: str | None = None,
    bands: list[str] | None = None,
    figure: Path | None = None,
    device: str | None = None,
    scene: dict[str, Path] | None = None,
    scene_bands: dict[str, list[str]] | None = None,
    reference_sensor: str | None = None,
    table: Path | None = None,
    part: str | None = None,
) -> None:
    """Map the features of a scene of any size as georeferenced rasters.

    With --table, every scene of a table is mapped. To resume a run that was stopped, give the same
    command again.

    Args:
        checkpoint: Checkpoint written by `geofm fit`, an export of one, or the name of weights in
            the package; with --model, a file of weights of that model.
        s1: Sentinel-1 scene: VV and VH in dB, on any grid.
        s2: Sentinel-2 scene in digital numbers (DN). The products are on its grid, unless
            --reference_sensor is given.
        item: STAC item with local assets of the model's sensors, in place of --scene.
        output: Folder to write to.
        products: Any of attention, rollout, point, pca, segments and embedding. By default all that
            the model supports; point only if --point is given.
        block: Index of the transformer block whose attention is shown; negative indices count from
            the end.
        point: LON,LAT in degrees: `point` is the attention of the patch there.
        window: Side of a window in pixels, a multiple of the patch size.
        overlap: Minimum overlap of neighbouring windows, as a fraction of the window, in [0, 1).
        batch_size: Number of windows per forward pass.
        stride: Distance between neighbouring values of the products, in pixels of the scene; less
            than the patch size, e.g. 4. It takes (patch size / stride)^2 times as long.
        pixels: Interpolation of the products to the pixel grid of the scene. By default, the
            products have one pixel per patch, or per stride.
        components: Number of principal components, at least 3; the first three are drawn as
            colours.
        basis: PCA basis (*_pca.safetensors) of another scene, for the same colours in both.
        segments: Number of clusters of the product `segments`.
        precision: Data type of the embeddings. int8 has a scale per dimension.
        dates: Acquisition date of a sensor, e.g. --dates s1=YYYY-MM-DD --dates s2=YYYY-MM-DD; by
            default from file names or metadata.
        missing_bands: Value of a band that the model needs and a file lacks: `mean` (of the band)
            or `zero`. By default a missing band is an error.
        model: Name of the timm model that the weights in the checkpoint belong to.
        bands: With --model: band names of the model's input channels, e.g. B04 B03 B02.
        figure: File of a figure with the scene and its products side by side, written as PNG and
            PDF. {scene} in its name is replaced by the name of the scene.
        device: Device to compute on, e.g. cuda; the CPU by default.
        scene: Raster of a sensor, given by its key, e.g. --scene s1=FILE --scene dem=FILE.
        scene_bands: Band names of a raster that does not name its bands, e.g.
            --scene_bands landsat=[B02,B03,B04].
        reference_sensor: Sensor whose grid the products are on. By default Sentinel-2 if it is
            given, else the first sensor in geofm's own order whose images change over time.
        table: Table of rasters written by `geofm index`. Every place and date is a scene; its
            products are written to a folder of its own in --output.
        part: With --table: I/N to map only part I of N, counted from 0. By default from the
            environment of torchrun, srun or a SLURM job array.
    """
    found = {} if dates is None else dict(dates)
    if item is not None and (s1 is not None or s2 is not None or scene):
        raise UsageError('give --item, or --s1 and --s2 (or --scene), not both')
    backbone = load_model(checkpoint, model, bands)
    # After the model: a checkpoint contains the definitions of its sensors.
    rasters = files_by_sensor(s1, s2, scene)
    if item is not None:
        from_item = read_item(item, output, backbone.bands)
        rasters, found = dict(from_item.files), {**from_item.dates, **found}
    options = Options(
        block=block,
        window=window,
        overlap=overlap,
        batch_size=batch_size,
        stride=stride,
        point=None if point is None else _lonlat(point),
        pixels=pixels,
        components=components,
        basis=basis,
        segments=segments,
        precision=precision,
        missing_bands=missing_bands,
    )
    device = own_device(device)
    if table is not None:
        if rasters or scene_bands or found or figure is not None:
            raise UsageError('give --table, or the files, dates and figure of a scene, not both')
        scenes = TableScenes(
            table, backbone.bands, reference=reference_sensor, missing_bands=missing_bands
        )
        own = Part.of(part)
        run = map_table(backbone, scenes, output, products, options, device, command_line(), own)
        say_scenes(run, output, len(own.items(len(scenes))))
        raise_failed(run)
        return
    files = map_scene(
        backbone,
        output=output,
        products=products,
        options=options,
        scene=rasters,
        reference=reference_sensor,
        dates=found,
        names=scene_bands,
        device=device,
        command=command_line(),
    )
    for path in files.values():
        say(path)
    if figure is not None:
        product, path = next(iter(files.items()))
        stem = path.name.removesuffix(f'_{product}.tif')
        target = figure.with_name(figure.name.replace('{scene}', stem))
        _draw(files, rasters, target, scene_bands, reference=reference_sensor)


def attention(
    checkpoint: Path,
    s1: Path | None = None,
    s2: Path | None = None,
    output: Path = Path('maps'),
    block: int = -1,
    point: str | None = None,
    window: int = 224,
    overlap: float = 0.5,
    batch_size: int = 8,
    stride: int | None = None,
    pixels: Literal['nearest', 'bilinear'] | None = 'nearest',
    missing_bands: Missing | None = None,
    device: str | None = None,
    scene: dict[str, Path] | None = None,
    scene_bands: dict[str, list[str]] | None = None,
    reference_sensor: str | None = None,
) -> None:
    """Map the attention of a backbone, and draw it. `geofm map` has more options.

    Args:
        checkpoint: Checkpoint written by `geofm fit`, an export of one, or the name of weights in
            the package.
        s1: Sentinel-1 scene: VV and VH in dB, on any grid.
        s2: Sentinel-2 scene in digital numbers (DN). The products are on its grid, unless
            --reference_sensor is given.
        output: Folder to write to.
        block: Index of the transformer block whose attention is shown; negative indices count from
            the end.
        point: Also map the attention of the patch at LON,LAT, in degrees.
        window: Side of a window in pixels, a multiple of the patch size.
        overlap: Minimum overlap of neighbouring windows, as a fraction of the window, in [0, 1).
        batch_size: Number of windows per forward pass.
        stride: Distance between neighbouring values of the products, in pixels of the scene; less
            than the patch size, e.g. 4. It takes (patch size / stride)^2 times as long.
        pixels: Interpolation of the products to the pixel grid of the scene. With `null` or
            --stride, the products have one pixel per patch or per stride.
        missing_bands: Value of a band that the model needs and a file lacks: `mean` (of the band)
            or `zero`. By default a missing band is an error.
        device: Device to compute on, e.g. cuda; the CPU by default.
        scene: Raster of a sensor, given by its key, e.g. --scene s1=FILE --scene dem=FILE.
        scene_bands: Band names of a raster that does not name its bands, e.g.
            --scene_bands landsat=[B02,B03,B04].
        reference_sensor: Sensor whose grid the products are on. By default Sentinel-2 if it is
            given, else the first sensor in geofm's own order whose images change over time.
    """
    products: list[Product] = ['attention']
    map_(
        checkpoint,
        s1,
        s2,
        output=output,
        figure=output / '{scene}_attention',
        products=products if point is None else [*products, 'point'],
        block=block,
        point=point,
        window=window,
        overlap=overlap,
        batch_size=batch_size,
        stride=stride,
        pixels=None if stride is not None and pixels == 'nearest' else pixels,
        missing_bands=missing_bands,
        scene=scene,
        scene_bands=scene_bands,
        reference_sensor=reference_sensor,
        device=device,
    )


def pca(
    checkpoint: Path,
    s1: Path | None = None,
    s2: Path | None = None,
    output: Path = Path('maps'),
    components: int = 3,
    basis: Path | None = None,
    window: int = 224,
    overlap: float = 0.5,
    batch_size: int = 8,
    stride: int | None = None,
    pixels: Literal['nearest', 'bilinear'] | None = None,
    missing_bands: Missing | None = None,
    device: str | None = None,
    scene: dict[str, Path] | None = None,
    scene_bands: dict[str, list[str]] | None = None,
    reference_sensor: str | None = None,
) -> None:
    """Map the principal components of patch tokens as colours, and draw them.

    `geofm map` has more options.

    Args:
        checkpoint: Checkpoint written by `geofm fit`, an export of one, or the name of weights in
            the package.
        s1: Sentinel-1 scene: VV and VH in dB, on any grid.
        s2: Sentinel-2 scene in digital numbers (DN). The products are on its grid, unless
            --reference_sensor is given.
        output: Folder to write to.
        components: Number of principal components, at least 3; the first three are drawn as
            colours.
        basis: PCA basis (*_pca.safetensors) of another scene, for the same colours in both.
        window: Side of a window in pixels, a multiple of the patch size.
        overlap: Minimum overlap of neighbouring windows, as a fraction of the window, in [0, 1).
        batch_size: Number of windows per forward pass.
        stride: Distance between neighbouring values of the products, in pixels of the scene; less
            than the patch size, e.g. 4. It takes (patch size / stride)^2 times as long.
        pixels: Interpolation of the products to the pixel grid of the scene. By default, the
            products have one pixel per patch, or per stride.
        missing_bands: Value of a band that the model needs and a file lacks: `mean` (of the band)
            or `zero`. By default a missing band is an error.
        device: Device to compute on, e.g. cuda; the CPU by default.
        scene: Raster of a sensor, given by its key, e.g. --scene s1=FILE --scene dem=FILE.
        scene_bands: Band names of a raster that does not name its bands, e.g.
            --scene_bands landsat=[B02,B03,B04].
        reference_sensor: Sensor whose grid the products are on. By default Sentinel-2 if it is
            given, else the first sensor in geofm's own order whose images change over time.
    """
    map_(
        checkpoint,
        s1,
        s2,
        output=output,
        figure=output / '{scene}_pca',
        products=['pca'],
        components=components,
        basis=basis,
        window=window,
        overlap=overlap,
        batch_size=batch_size,
        stride=stride,
        pixels=pixels,
        missing_bands=missing_bands,
        scene=scene,
        scene_bands=scene_bands,
        reference_sensor=reference_sensor,
        device=device,
    )


def embed(
    checkpoint: Path,
    s1: Path | None = None,
    s2: Path | None = None,
    output: Path = Path('maps'),
    precision: Literal['float32', 'float16', 'int8'] = 'float32',
    window: int = 224,
    overlap: float = 0.5,
    batch_size: int = 8,
    stride: int | None = None,
    missing_bands: Missing | None = None,
    device: str | None = None,
    scene: dict[str, Path] | None = None,
    scene_bands: dict[str, list[str]] | None = None,
    reference_sensor: str | None = None,
    table: Path | None = None,
    part: str | None = None,
) -> None:
    """Write the embedding of every patch as GeoTIFF and GeoParquet.

    `geofm map` has more options.

    Args:
        checkpoint: Checkpoint written by `geofm fit`, an export of one, or the name of weights in
            the package.
        s1: Sentinel-1 scene: VV and VH in dB, on any grid.
        s2: Sentinel-2 scene in digital numbers (DN). The products are on its grid, unless
            --reference_sensor is given.
        output: Folder to write to.
        precision: Data type of the embeddings. int8 has a scale per dimension.
        window: Side of a window in pixels, a multiple of the patch size.
        overlap: Minimum overlap of neighbouring windows, as a fraction of the window, in [0, 1).
        batch_size: Number of windows per forward pass.
        stride: Distance between neighbouring values of the products, in pixels of the scene; less
            than the patch size, e.g. 4. It takes (patch size / stride)^2 times as long.
        missing_bands: Value of a band that the model needs and a file lacks: `mean` (of the band)
            or `zero`. By default a missing band is an error.
        device: Device to compute on, e.g. cuda; the CPU by default.
        scene: Raster of a sensor, given by its key, e.g. --scene s1=FILE --scene dem=FILE.
        scene_bands: Band names of a raster that does not name its bands, e.g.
            --scene_bands landsat=[B02,B03,B04].
        reference_sensor: Sensor whose grid the products are on. By default Sentinel-2 if it is
            given, else the first sensor in geofm's own order whose images change over time.
        table: Table of rasters written by `geofm index`. Every place and date is a scene; its
            products are written to a folder of its own in --output.
        part: With --table: I/N to map only part I of N, counted from 0. By default from the
            environment of torchrun, srun or a SLURM job array.
    """
    map_(
        checkpoint,
        s1,
        s2,
        output=output,
        products=['embedding'],
        precision=precision,
        window=window,
        overlap=overlap,
        batch_size=batch_size,
        stride=stride,
        missing_bands=missing_bands,
        scene=scene,
        scene_bands=scene_bands,
        reference_sensor=reference_sensor,
        table=table,
        part=part,
        device=device,
    )


def search(
    embeddings: Path,
    *,
    at: str,
    top: int = 10,
    output: list[Path] | None = None,
) -> None:
    """List the patches whose embeddings are most similar to that of the patch at a given point.

    Args:
        embeddings: Table of embeddings (*_embedding.parquet) written by `geofm embed`.
        at: LON,LAT of the point, in degrees.
        top: Number of patches to list.
        output: Files to write: the patches as .geojson or .gpkg, a map of them as .png or .pdf.
    """
    result = search_embeddings(embeddings, _lonlat(at), top)
    _print_places(result)
    for path in output or ():
        result.save(path)
        say(path)


def figure(
    folder: Path,
    s1: Path | None = None,
    s2: Path | None = None,
    output: Path | None = None,
    title: str | None = None,
    scene: dict[str, Path] | None = None,
    scene_bands: dict[str, list[str]] | None = None,
    reference_sensor: str | None = None,
) -> None:
    """Draw a scene and its products side by side, with scale bar and north arrow.

    Args:
        folder: Folder with products written by the map commands.
        s1: Sentinel-1 scene.
        s2: Sentinel-2 scene.
        output: File to write. Both a .png and a .pdf are written, whatever the suffix. By default
            SCENE_figure in the folder of the products.
        title: Title; by default the name of the scene.
        scene: Raster of a sensor, given by its key, e.g. --scene s1=FILE --scene dem=FILE.
        scene_bands: Band names of a raster that does not name its bands, e.g.
            --scene_bands landsat=[B02,B03,B04].
        reference_sensor: Sensor whose grid the products are on. By default Sentinel-2 if it is
            given, else the first sensor in geofm's own order whose images change over time.
    """
    rasters = files_by_sensor(s1, s2, scene)
    # Products are named after the raster of the reference sensor; a model of one sensor may have
    # used any of the rasters.
    stems = [_stem(path) for path in _by_grid(rasters, reference_sensor)]
    for stem in stems:
        paths = {product: folder / f'{stem}_{product}.tif' for product in DRAWN}
        if files := {product: path for product, path in paths.items() if path.exists()}:
            break
    else:
        names = ' or '.join(stems) or 'a scene'
        raise ValueError(f'{folder}: no products of {names}; run `geofm map` first')
    target = output or folder / f'{stem}_figure'
    _draw(files, rasters, target, scene_bands, title, reference_sensor)


def _draw(
    files: Mapping[str, Path],
    rasters: Mapping[str, Path],
    output: Path,
    names: Mapping[str, Sequence[str]] | None,
    title: str | None = None,
    reference: str | None = None,
) -> None:
    stem = output.with_suffix('') if output.suffix in ('.png', '.pdf') else output
    with locked_folder(stem.parent):
        drawn = plot_products(files, scene=rasters, reference=reference, names=names, title=title)
        for path in save_figure(drawn, stem):
            say(path)


def _by_grid(rasters: Mapping[str, Path], reference: str | None) -> list[Path]:
    """Return the rasters of a scene, starting with that of the reference sensor."""
    left, ordered = dict(rasters), []
    if reference in left:
        ordered.append(left.pop(reference))
    while left:
        ordered.append(left.pop(reference_of([*left])))
    return ordered


def _stem(path: Path) -> str:
    """Return the name that products of a raster begin with, whether or not the file exists."""
    try:
        return Address.parse(path).stem
    except (FileNotFoundError, ValueError):
        return path.stem


def _lonlat(text: str) -> tuple[float, float]:
    try:
        lon, lat = (float(part) for part in text.split(','))
    except ValueError as error:
        raise UsageError(f"'{text}' is not a point: give LON,LAT in degrees") from error
    if not (-180 <= lon <= 180 and -90 <= lat <= 90):
        raise UsageError(f"'{text}' is not on Earth: give LON,LAT in degrees")
    return lon, lat


def _print_places(result: SearchResult) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table('', 'similarity', 'longitude', 'latitude', 'distance', 'date')
    dates = [name for name in result.places.columns if name.startswith('date_')]
    for place in result.places.to_dict('records'):
        days = dict.fromkeys(str(place[name]) for name in dates if place[name] is not None)
        table.add_row(
            str(place['rank'] or 'here'),
            f'{place["similarity"]:.4f}',
            f'{place["longitude"]:.5f}',
            f'{place["latitude"]:.5f}',
            f'{place["distance"] / 1000:.2f} km',
            ', '.join(days),
        )
    Console().print(table)
