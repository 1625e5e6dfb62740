"""The command that maps the change between two dates."""

from pathlib import Path

from geofm.printing import say


def change(before: Path, after: Path, output: Path = Path('maps')) -> None:
    """Map the change between two dates: the cosine distance of their embeddings.

    Args:
        before: Embeddings (*_embedding.tif) of the first date, written by `geofm embed`.
        after: Embeddings of the second date, from the same model and on the same grid.
        output: Folder for SCENE_change.tif. If it is the folder with the products of the second
            date, `geofm page` shows the change as a layer.
    """
    from geofm.maps.make import map_change

    say(map_change(before, after, output, f'geofm change {before.name} {after.name}'))
