"""Tasks: what a Trainer trains."""

from geofm.tasks.dinov2 import DINOv2
from geofm.tasks.mask2former import Mask2Former

__all__ = ('DINOv2', 'Mask2Former')
