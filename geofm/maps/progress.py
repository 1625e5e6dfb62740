"""How far the mapping of scenes is, and the memory of its reading."""

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

#: GDAL's cache in bytes. Its default, a share of the machine's memory, is more than is needed.
CACHE_BYTES = 128 * 2**20


def show_progress() -> Progress:
    """A progress bar that tells how many there are and how much time is left."""
    return Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        TextColumn('{task.completed:.0f} of {task.total:.0f}'),
        TimeRemainingColumn(),
    )
