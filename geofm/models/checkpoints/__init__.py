"""Checkpoint files: which model a file holds, and safe reading and writing."""

from geofm.models.checkpoints.backbones import build_backbone
from geofm.models.checkpoints.definitions import carry_sensors, take_up_sensors_of
from geofm.models.checkpoints.files import (
    HUB_WEIGHTS,
    METADATA,
    CheckpointError,
    hash_tensors,
    released,
    write_safetensors,
)
from geofm.models.checkpoints.model_file import LOCAL_DIR, ModelFile, read_model
from geofm.models.checkpoints.sharded import (
    SHARDS_REST,
    is_sharded,
    load_shards,
    read_rest,
    read_sharded,
)
from geofm.models.checkpoints.statistics import INPUT, carry_statistics
from geofm.models.checkpoints.trust import check_model_name, check_weights

__all__ = (
    'HUB_WEIGHTS',
    'INPUT',
    'LOCAL_DIR',
    'METADATA',
    'SHARDS_REST',
    'CheckpointError',
    'ModelFile',
    'build_backbone',
    'carry_sensors',
    'carry_statistics',
    'check_model_name',
    'check_weights',
    'hash_tensors',
    'is_sharded',
    'load_shards',
    'read_model',
    'read_rest',
    'read_sharded',
    'released',
    'take_up_sensors_of',
    'write_safetensors',
)
