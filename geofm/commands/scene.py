"""The command that writes a scene of a table of rasters."""

import re
from pathlib import Path

from geofm.printing import say


def scene(table: Path, place: str, output: Path | None = None, date: str | None = None) -> None:
    """Write the observations of a place as one GeoTIFF per sensor, for the map commands.

    Bands from separate files, netCDF files or product folders are combined in one raster per
    sensor, all on the grid of the reference sensor.

    Args:
        table: Table of rasters written by `geofm index`.
        place: Name of the place, from the column 'place' of the table.
        output: Folder to write to; by default a new folder named after the place.
        date: Use the observation closest to this date (YYYY-MM-DD); by default the earliest.
    """
    from geofm.datasets.archive import write_scene
    from geofm.datasets.table import open_table
    from geofm.sensors import SENSORS

    # The name of a place may hold any characters.
    folder = output or Path(re.sub(r'[^\w-]', '_', place))
    found = write_scene(open_table(table), place, folder, date)
    for key, file in found.files.items():
        say(f'{file}: {SENSORS[key].title}{f", {found.dates[key]}" if key in found.dates else ""}')
    options = ' '.join(f'--scene {key}={file}' for key, file in found.files.items())
    say(f'To map it: geofm map CHECKPOINT {options}')
