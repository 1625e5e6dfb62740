"""How good are the features? Probes that need no training, and what they stand on."""

from geofm.evaluation.benchmark import Score, benchmark_knn, print_scores, write_scores
from geofm.evaluation.features import (
    LabelledFeatures,
    backbone_encoder,
    band_statistics_encoder,
    extract_features,
)
from geofm.evaluation.knn import knn_accuracy, knn_predict

__all__ = (
    'LabelledFeatures',
    'Score',
    'backbone_encoder',
    'band_statistics_encoder',
    'benchmark_knn',
    'extract_features',
    'knn_accuracy',
    'knn_predict',
    'print_scores',
    'write_scores',
)
