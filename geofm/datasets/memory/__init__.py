"""Arrays and lists of paths that the processes of a machine share."""

from geofm.datasets.memory.release import give_back

__all__ = ('give_back',)
