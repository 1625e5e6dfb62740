"""How good are the features? Probes that need no training, and what they stand on."""

from .benchmark import Score, benchmark_knn, print_scores, write_scores
from .features import (
    LabelledFeatures,
    backbone_encoder,
    band_statistics_encoder,
    extract_features,
)
from .knn import knn_accuracy, knn_predict

__all__ = [
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
]
