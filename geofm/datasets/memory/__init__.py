"""Arrays and lists of paths that the processes of a machine share."""

from geofm.datasets.memory.release import release_memory

__all__ = ('release_memory',)
