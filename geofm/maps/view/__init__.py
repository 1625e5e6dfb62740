"""Viewing maps: figures, tiles, a web page, and search for similar places."""

from geofm.maps.view.figure import DRAWN
from geofm.maps.view.places import SearchResult

__all__ = (
    'DRAWN',
    'SearchResult',
)
