"""Samples of any table of rasters: windows of scenes, matched between sensors by place and date."""
