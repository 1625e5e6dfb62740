"""Commands that show what a backbone sees."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from geofm.commands.tables_mapped import command_line, raise_failed, say_scenes
from geofm.locking import locked_folder
from geofm.maps import Options, Product, map_scene, plot_products, read_item, save_figure
from geofm.maps import search as search_embeddings
from geofm.maps.make.products import map_table
from geofm.maps.make.tables import Part, own_device
from geofm.maps.scene import Missing, TableScenes, files_by_sensor
from geofm.maps.view.figure import DRAWN
from geofm.maps.view.places import SearchResult
from geofm.models.timm_vit import load_model
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
    """Map what a backbone sees of a scene of any size, as rasters that lie on it.

    With --table, every scene of a table is mapped.

    Give the same command again to resume a run that was stopped.

    Args:
        checkpoint: Checkpoint that `geofm fit` wrote; with --model, a file of that model's weights.
        s1: Sentinel-1 scene: VV and VH in dB, on any grid.
        s2: Sentinel-2 scene: bands as DN. Its grid is that of the products.
        item: STAC item with local assets of the model's sensors, instead of rasters.
        output: Folder to write to.
        products: Some of [attention, rollout, point, pca, segments, embedding]; all if not given.
        block: Block whose attention to show; negative counts from the last.
        point: LON,LAT of the place whose attention the product 'point' shows.
        window: Side of a window in pixels, a multiple of the patch size.
        overlap: Least fraction of a window that the next one covers too, in [0, 1).
        batch_size: Windows a forward pass.
        stride: Pixels of the scene from one value to the next, below the patch size, e.g. 4; takes
            (patch size / stride)^2 times as long.
        pixels: Write products on the pixels of the scene, and how; one pixel a patch, or a stride,
            if not given.
        components: Number of principal components.
        basis: PCA basis of another scene (*_pca.safetensors), for the same colours.
        segments: Number of segments.
        precision: How embeddings are stored.
        dates: Days of acquisition, as --dates s1=YYYY-MM-DD --dates s2=YYYY-MM-DD; from file names
            or metadata if not given.
        missing_bands: What stands for a band of the model that a file lacks: its `mean` or `zero`;
            an error if not given.
        model: Name of a timm model whose weights the checkpoint holds.
        bands: Names of the model's channels, e.g. [B04,B03,B02].
        figure: File to draw the scene and its products to, side by side, as PNG and as PDF; {scene}
            in its name stands for the name of the scene.
        device: Where to compute, e.g. cuda; on the CPU if not given.
        scene: Scenes of any sensors by key, as --scene s1=FILE --scene dem=FILE.
        scene_bands: Names of the bands of files of any sensors, if they do not say, as
            --scene_bands landsat=[B02,B03,B04].
        reference_sensor: Sensor whose grid the products are on; Sentinel-2 where it is given, else
            the first that does not stay the same over time.
        table: Table of rasters, as `geofm index` writes it: every place and date is a scene, whose
            products are in a folder of --output.
        part: With --table, the scenes of this process as I/N, part I of N from 0; as torchrun, srun
            or an array of SLURM says if not given.
    """
    found = {} if dates is None else dict(dates)
    if item is not None and (s1 is not None or s2 is not None or scene):
        raise ValueError('give --item, or --s1 and --s2 (or --scene), not both')
    backbone = load_model(checkpoint, model, bands)
    # A checkpoint brings the definitions of its sensors along.
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
            raise ValueError('give --table or the files, dates and figure of one scene, not both')
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
    """Map where a backbone looks, and draw it; `geofm map` has more choices.

    Args:
        checkpoint: Checkpoint that `geofm fit` wrote.
        s1: Sentinel-1 scene: VV and VH in dB, on any grid.
        s2: Sentinel-2 scene: bands as DN. Its grid is that of the products.
        output: Folder to write to.
        block: Block whose attention to show; negative counts from the last.
        point: LON,LAT of a place; its attention is mapped too.
        window: Side of a window in pixels, a multiple of the patch size.
        overlap: Least fraction of a window that the next one covers too, in [0, 1).
        batch_size: Windows a forward pass.
        stride: Pixels of the scene from one value to the next, below the patch size, e.g. 4; takes
            (patch size / stride)^2 times as long.
        pixels: How a pixel of the scene gets the value of its patch; null: one pixel a patch, or a
            stride, as always with --stride.
        missing_bands: What stands for a band of the model that a file lacks: its `mean` or `zero`;
            an error if not given.
        device: Where to compute, e.g. cuda; on the CPU if not given.
        scene: Scenes of any sensors by key, as --scene s1=FILE --scene dem=FILE.
        scene_bands: Names of the bands of files of any sensors, if they do not say, as
            --scene_bands landsat=[B02,B03,B04].
        reference_sensor: Sensor whose grid the products are on; Sentinel-2 where it is given, else
            the first that does not stay the same over time.
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

    `geofm map` has more choices.

    Args:
        checkpoint: Checkpoint that `geofm fit` wrote.
        s1: Sentinel-1 scene: VV and VH in dB, on any grid.
        s2: Sentinel-2 scene: bands as DN. Its grid is that of the products.
        output: Folder to write to.
        components: Number of principal components.
        basis: PCA basis of another scene (*_pca.safetensors), for the same colours.
        window: Side of a window in pixels, a multiple of the patch size.
        overlap: Least fraction of a window that the next one covers too, in [0, 1).
        batch_size: Windows a forward pass.
        stride: Pixels of the scene from one value to the next, below the patch size, e.g. 4; takes
            (patch size / stride)^2 times as long.
        pixels: Write products on the pixels of the scene, and how; one pixel a patch, or a stride,
            if not given.
        missing_bands: What stands for a band of the model that a file lacks: its `mean` or `zero`;
            an error if not given.
        device: Where to compute, e.g. cuda; on the CPU if not given.
        scene: Scenes of any sensors by key, as --scene s1=FILE --scene dem=FILE.
        scene_bands: Names of the bands of files of any sensors, if they do not say, as
            --scene_bands landsat=[B02,B03,B04].
        reference_sensor: Sensor whose grid the products are on; Sentinel-2 where it is given, else
            the first that does not stay the same over time.
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
    """Write the embedding of every patch, as GeoTIFF and GeoParquet; `geofm map` has more choices.

    Args:
        checkpoint: Checkpoint that `geofm fit` wrote.
        s1: Sentinel-1 scene: VV and VH in dB, on any grid.
        s2: Sentinel-2 scene: bands as DN. Its grid is that of the products.
        output: Folder to write to.
        precision: How numbers are stored; int8 with a scale for each dimension.
        window: Side of a window in pixels, a multiple of the patch size.
        overlap: Least fraction of a window that the next one covers too, in [0, 1).
        batch_size: Windows a forward pass.
        stride: Pixels of the scene from one value to the next, below the patch size, e.g. 4; takes
            (patch size / stride)^2 times as long.
        missing_bands: What stands for a band of the model that a file lacks: its `mean` or `zero`;
            an error if not given.
        device: Where to compute, e.g. cuda; on the CPU if not given.
        scene: Scenes of any sensors by key, as --scene s1=FILE --scene dem=FILE.
        scene_bands: Names of the bands of files of any sensors, if they do not say, as
            --scene_bands landsat=[B02,B03,B04].
        reference_sensor: Sensor whose grid the products are on; Sentinel-2 where it is given, else
            the first that does not stay the same over time.
        table: Table of rasters: every place and date is a scene.
        part: With --table, the scenes of this process, see `geofm map`.
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
    at: str | None = None,
    top: int = 10,
    output: list[Path] | None = None,
) -> None:
    """List the places whose embeddings are most similar to that of a place.

    Args:
        embeddings: Table of embeddings (*_embedding.parquet) that `geofm map` wrote.
        at: LON,LAT of the place, in degrees. Needed.
        top: Number of similar places.
        output: Files to write: the places as .geojson or .gpkg, a map of them as .png or .pdf.
    """
    if at is None:
        raise ValueError('similar to which place? Give --at LON,LAT')
    result = search_embeddings(embeddings, _lonlat(at), top)
    _print_places(result)
    for path in output or ():
        result.save(path)
        say(path)


def figure(
    directory: Path,
    s1: Path | None = None,
    s2: Path | None = None,
    output: Path | None = None,
    title: str | None = None,
    scene: dict[str, Path] | None = None,
    scene_bands: dict[str, list[str]] | None = None,
    reference_sensor: str | None = None,
) -> None:
    """Draw a scene and its products side by side, with scale bar and north arrow: PNG and PDF.

    Args:
        directory: Folder of the products that `geofm map` wrote.
        s1: Sentinel-1 scene.
        s2: Sentinel-2 scene.
        output: File to write, with or without .png or .pdf: both are written. In the folder of the
            products if not given.
        title: Title; the scene's name if not given.
        scene: Scenes of any sensors by key, as --scene s1=FILE --scene dem=FILE.
        scene_bands: Names of the bands of files of any sensors, if they do not say, as
            --scene_bands landsat=[B02,B03,B04].
        reference_sensor: Sensor whose grid the products are on; Sentinel-2 where it is given, else
            the first that does not stay the same over time.
    """
    rasters = files_by_sensor(s1, s2, scene)
    # The raster that gives the grid gives the name; a model of one sensor may have had any.
    stems = [_stem(path) for path in _by_grid(rasters, reference_sensor)]
    for stem in stems:
        paths = {product: directory / f'{stem}_{product}.tif' for product in DRAWN}
        if files := {product: path for product, path in paths.items() if path.exists()}:
            break
    else:
        raise ValueError(f'{directory}: no products of {stems or "a scene"}; run `geofm map`')
    target = output or directory / f'{stem}_figure'
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
    """Rasters of a scene, that whose grid the products are on first."""
    left, ordered = dict(rasters), []
    if reference in left:
        ordered.append(left.pop(reference))
    while left:
        ordered.append(left.pop(reference_of([*left])))
    return ordered


def _stem(path: Path) -> str:
    """Name that products of a raster begin with; that of a missing file is found later."""
    try:
        return Address.parse(path).stem
    except (FileNotFoundError, ValueError):
        return path.stem


def _lonlat(text: str) -> tuple[float, float]:
    try:
        lon, lat = (float(part) for part in text.split(','))
    except ValueError as error:
        raise ValueError(f"'{text}' is no place: give LON,LAT in degrees") from error
    if not (-180 <= lon <= 180 and -90 <= lat <= 90):
        raise ValueError(f"'{text}' is not on Earth: give LON,LAT in degrees")
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
