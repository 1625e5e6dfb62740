"""``python -m geofm``."""

from .cli import main

main()
