"""A web page to explore a scene and what a backbone sees in it, without network or server."""

from geofm.maps.view.page.embedding import EmbeddingGrid
from geofm.maps.view.page.layers import BACKDROP, Layer, find_products, product_layers, scene_layers
from geofm.maps.view.page.write import write_page

__all__ = (
    'BACKDROP',
    'EmbeddingGrid',
    'Layer',
    'find_products',
    'product_layers',
    'scene_layers',
    'write_page',
)
