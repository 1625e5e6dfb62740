"""Evaluation of features: probes on labelled data, compared with baselines."""

from geofm.evaluation.accuracy import Accuracy, Confusions
from geofm.evaluation.backbones import BackboneConfig, encoder_of
from geofm.evaluation.benchmark import Probe, ProbeSettings, run_benchmark
from geofm.evaluation.data import LabelledData, labelled_data
from geofm.evaluation.data.paired import PairedDataModule
from geofm.evaluation.features import LabelledFeatures, extract_features, side_by_side
from geofm.evaluation.figures import write_figures
from geofm.evaluation.map_accuracy import assess_maps
from geofm.evaluation.probes.knn import (
    knn_accuracy,
    knn_average_precision,
    knn_predict,
    knn_votes,
    whiten,
)
from geofm.evaluation.report import Report, Score, print_report, write_report

__all__ = (
    'Accuracy',
    'BackboneConfig',
    'Confusions',
    'LabelledData',
    'LabelledFeatures',
    'PairedDataModule',
    'Probe',
    'ProbeSettings',
    'Report',
    'Score',
    'assess_maps',
    'encoder_of',
    'extract_features',
    'knn_accuracy',
    'knn_average_precision',
    'knn_predict',
    'knn_votes',
    'labelled_data',
    'print_report',
    'run_benchmark',
    'side_by_side',
    'whiten',
    'write_figures',
    'write_report',
)
