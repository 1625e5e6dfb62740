"""Readers of pixels: one protocol for GeoTIFFs, arrays and products as they are delivered."""
