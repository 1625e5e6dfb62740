"""Tasks: what a Trainer trains."""

from geofm.tasks.dinov2 import DINOv2
from geofm.tasks.distillation import Distillation
from geofm.tasks.fine_tuned import FineTuned, check_model, load_fine_tuned, logits, without_sensors
from geofm.tasks.mask2former import Mask2Former
from geofm.tasks.masked_words import MaskedWords
from geofm.tasks.nonfinite import replay
from geofm.tasks.parameters import layer_scale, scale_learning_rates
from geofm.tasks.pretraining import NO_STEPS, PretrainingTask, networks_on_meta
from geofm.tasks.student_teacher import StudentTeacher
from geofm.tasks.teacher import Teacher

__all__ = (
    'NO_STEPS',
    'DINOv2',
    'Distillation',
    'FineTuned',
    'Mask2Former',
    'MaskedWords',
    'PretrainingTask',
    'StudentTeacher',
    'Teacher',
    'check_model',
    'layer_scale',
    'load_fine_tuned',
    'logits',
    'networks_on_meta',
    'replay',
    'scale_learning_rates',
    'without_sensors',
)
