"""Tasks: what a Trainer trains."""

from geofm.tasks.dinov2 import DINOv2

__all__ = ('DINOv2',)
