"""Maps of what a backbone sees in a scene."""

from geofm.maps.figure import plot_products, save_figure
from geofm.maps.places import search
from geofm.maps.products import Options, Product, map_scene
from geofm.maps.stac import read_item

__all__ = (
    'Options',
    'Product',
    'map_scene',
    'plot_products',
    'read_item',
    'save_figure',
    'search',
)
