"""A web page to explore a scene with its attention and features, without a server."""

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
