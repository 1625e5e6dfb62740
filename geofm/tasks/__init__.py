"""Tasks: what a Trainer trains."""

from geofm.tasks.dinov2 import DINOv2
from geofm.tasks.distillation import Distillation
from geofm.tasks.mask2former import Mask2Former
from geofm.tasks.masked_words import MaskedWords
from geofm.tasks.pretraining import PretrainingTask
from geofm.tasks.student_teacher import StudentTeacher
from geofm.tasks.teacher import Teacher

__all__ = (
    'DINOv2',
    'Distillation',
    'Mask2Former',
    'MaskedWords',
    'PretrainingTask',
    'StudentTeacher',
    'Teacher',
)
