"""The catalogue: a table of the files below a folder, with what they show and their problems."""

from geofm.datasets.catalogue.catalogue import Catalogue, in_cache, update_catalogue
from geofm.datasets.catalogue.inspection import UNNAMED, sample_values
from geofm.datasets.catalogue.scenes import Scenes

__all__ = (
    'UNNAMED',
    'Catalogue',
    'Scenes',
    'in_cache',
    'sample_values',
    'update_catalogue',
)
