"""``python -m geofm``."""

from geofm.cli import main

main()
