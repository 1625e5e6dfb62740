"""The command that makes a web page of a scene's products."""

from pathlib import Path

from geofm.printing import say


def page(
    folder: Path,
    s1: Path | None = None,
    s2: Path | None = None,
    name: str | None = None,
    output: Path | None = None,
    title: str | None = None,
    basemap: str | None = None,
    scene: dict[str, Path] | None = None,
    scene_bands: dict[str, list[str]] | None = None,
) -> None:
    """Make a web page of a scene's products, with map layers and similarity search by click.

    Give --scene KEY=FILE for each sensor to show images of the scene as base layers under the maps.

    Args:
        folder: Folder with products written by the map commands.
        s1: Sentinel-1 scene, shown as a base layer under the maps.
        s2: Sentinel-2 scene, shown as a base layer under the maps.
        name: Name of the scene to show, if the folder has products of several scenes.
        output: Folder of the page; by default NAME_page in the folder of the products.
        title: Title of the page; by default the name of the scene.
        basemap: URL of map tiles on the Internet, with {z}, {x} and {y}, for a further base layer
            that is hidden at first.
        scene: Raster of a sensor, given by its key, e.g. --scene s1=FILE --scene dem=FILE.
        scene_bands: Band names of a raster that does not name its bands, e.g.
            --scene_bands landsat=[B02,B03,B04].
    """
    try:
        from geofm.maps.view.page import find_products, product_layers, scene_layers, write_page
    except ModuleNotFoundError as error:
        raise ValueError(
            f"a page needs '{error.name}': install it with `pip install geofm[maps]`"
        ) from error

    products = find_products(folder, name)
    product, path = next(iter(products.items()))
    stem = path.name.removesuffix(f'_{product}.tif')
    index = write_page(
        output or folder / f'{stem}_page',
        [*scene_layers(s1, s2, scene, scene_bands), *product_layers(products)],
        products.get('embedding'),
        title=title or stem,
        basemap=basemap,
    )
    say(index)
