"""geofm: pretrain geospatial foundation models, and use them in TorchGeo."""

__version__ = '0.1.0'
