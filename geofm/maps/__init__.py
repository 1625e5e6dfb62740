"""Maps of what a backbone sees in a scene."""

from geofm.maps.make.products import Options, Product, map_scene
from geofm.maps.scene import read_item
from geofm.maps.view.figure import plot_products, save_figure
from geofm.maps.view.places import search

__all__ = (
    'Options',
    'Product',
    'map_scene',
    'plot_products',
    'read_item',
    'save_figure',
    'search',
)
