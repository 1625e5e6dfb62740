"""The command that makes a web page of a scene's products."""

from pathlib import Path

from geofm.printing import say


def page(
    directory: Path,
    s1: Path | None = None,
    s2: Path | None = None,
    scene: str | None = None,
    output: Path | None = None,
    title: str | None = None,
    basemap: str | None = None,
    scene_files: dict[str, Path] | None = None,
    scene_bands: dict[str, list[str]] | None = None,
) -> None:
    """Make a web page of a scene's products, with map layers and similarity search by click.

    Give --scene KEY=FILE for each sensor to show pictures of the scene below the maps.

    Args:
        directory: Folder with products written by `geofm map`.
        s1: Sentinel-1 scene, for a picture below the maps.
        s2: Sentinel-2 scene, for a picture below the maps.
        scene: Name of the scene to show, if the folder has products of several scenes.
        output: Folder of the page; by default in the folder of the products.
        title: Title of the page; by default the name of the scene.
        basemap: URL of map tiles on the Internet, with {z}, {x} and {y}. The page offers this
            layer, switched off at first.
        scene_files: Scenes of any sensors by key, e.g. --scene s1=FILE --scene dem=FILE.
        scene_bands: Band names of files that do not name their bands, e.g.
            --scene_bands landsat=[B02,B03,B04].
    """
    try:
        from geofm.maps.view.page import find_products, product_layers, scene_layers, write_page
    except ModuleNotFoundError as error:
        raise ValueError(
            f"a page needs '{error.name}': install it with `pip install geofm[maps]`"
        ) from error

    products = find_products(directory, scene)
    product, path = next(iter(products.items()))
    name = path.name.removesuffix(f'_{product}.tif')
    index = write_page(
        output or directory / f'{name}_page',
        [*scene_layers(s1, s2, scene_files, scene_bands), *product_layers(products)],
        products.get('embedding'),
        title=title or name,
        basemap=basemap,
    )
    say(index)
