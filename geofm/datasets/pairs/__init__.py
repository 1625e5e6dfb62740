"""Which Sentinel-1 file goes with which Sentinel-2 file, and reading both on one grid."""
