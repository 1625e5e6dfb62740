"""The command that maps the change between two dates."""

from pathlib import Path

from geofm.maps.make.change import map_change
from geofm.printing import say


def change(before: Path, after: Path, output: Path = Path('maps')) -> None:
    """Map the change between two dates: the cosine distance of their embeddings.

    Args:
        before: Embedding (*_embedding.tif) of the first date that `geofm embed` wrote.
        after: That of the second date, of the same model and on the same grid.
        output: Folder of <scene>_change.tif. In the folder of the second date's products, `geofm
            page` shows it as a layer.
    """
    say(map_change(before, after, output, f'geofm change {before.name} {after.name}'))
