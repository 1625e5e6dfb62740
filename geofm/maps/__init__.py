"""Maps of a scene: attention, features, predictions and change.

:mod:`geofm.maps.scene` reads the inputs on one grid, :mod:`geofm.maps.make` makes the maps,
:mod:`geofm.maps.few_labels` classifies embeddings, and :mod:`geofm.maps.view` draws the results.
"""

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
