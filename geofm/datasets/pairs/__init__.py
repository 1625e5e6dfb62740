"""Match files of several sensors that show the same ground, and read them on one grid."""

from geofm.datasets.pairs.dataset import MatchedDataset, OnError
from geofm.datasets.pairs.inputs import Listing, list_scenes
from geofm.datasets.pairs.pairing import pair_scenes
from geofm.datasets.pairs.skipped import Reason, Skipped
from geofm.datasets.pairs.table import MIN_OVERLAP, Draft, PairTable, check_overlap

__all__ = (
    'MIN_OVERLAP',
    'Draft',
    'Listing',
    'MatchedDataset',
    'OnError',
    'PairTable',
    'Reason',
    'Skipped',
    'check_overlap',
    'list_scenes',
    'pair_scenes',
)
