"""Readers of file formats with a common protocol: GDAL rasters, arrays and Sentinel-2 products."""
