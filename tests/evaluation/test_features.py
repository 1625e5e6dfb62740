from typing import Any

import numpy as np
import pytest
import torch

from geofm.evaluation import (
    backbone_encoder,
    band_statistics_encoder,
    extract_features,
)
from geofm.evaluation.benchmark import benchmark_knn, print_scores, write_scores
from geofm.models import MultiSensorViT
from tests.pairs import RandomPairs, RandomPairsDataModule


def test_statistics_are_of_the_valid_pixels_alone() -> None:
    image = torch.randn(2, 3, 8, 8)
    valid = torch.rand(2, 8, 8) < 0.7
    image[0, :, ~valid[0]] = 1e6
    features = band_statistics_encoder({'image': image, 'valid': valid})
    for b in range(2):
        pixels = image[b][:, valid[b]].numpy()
        expected = np.concatenate([pixels.mean(axis=1), pixels.std(axis=1)])
        np.testing.assert_allclose(features[b].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_features_come_with_their_labels_in_order() -> None:
    data = RandomPairs(10)
    batches = [torch.utils.data.default_collate([data[i] for i in part]) for part in ([0, 1], [2])]
    backbone = MultiSensorViT(embed_dim=32, depth=1, num_heads=2, patch_size=8).eval()
    features, labels = extract_features(backbone_encoder(backbone), batches, lambda batch: batch)
    assert labels.tolist() == [0, 1, 0]
    image, dates = data[2]['image'][None], data[2]['dates'][None]
    torch.testing.assert_close(features[2], backbone(image, dates)[0])
    patches, _ = extract_features(backbone_encoder(backbone, 'patches'), batches, lambda b: b)
    tokens = backbone.forward_features(image, dates)[0, backbone.num_prefix_tokens :]
    torch.testing.assert_close(patches[2], tokens.mean(dim=0))


def test_data_without_labels_or_without_a_batch_are_refused() -> None:
    def encoder(batch: Any) -> torch.Tensor:
        return torch.zeros(1, 2)

    with pytest.raises(ValueError, match='must have a label'):
        extract_features(encoder, [{'image': torch.zeros(1)}], lambda batch: batch)
    with pytest.raises(ValueError, match='no batch'):
        extract_features(encoder, [], lambda batch: batch)


def test_benchmark_scores_every_kind_of_features(tmp_path: Any, capsys: Any) -> None:
    encoders = {
        'the label': lambda batch: torch.stack([1 - batch['label'], batch['label']], 1).float(),
        'nothing': lambda batch: torch.ones(len(batch['label']), 2),
    }
    scores = benchmark_knn(encoders, RandomPairsDataModule(length=16), k=(1, 3))
    accuracy = {(s.features, s.probe): s.accuracy for s in scores}
    assert accuracy['the label', '1-NN'] == accuracy['the label', '3-NN'] == 1.0
    assert accuracy['nothing', '1-NN'] == 0.5
    assert {(s.train, s.test) for s in scores} == {(16, 8)}
    write_scores(scores, tmp_path / 'new' / 'scores.json')
    assert list((tmp_path / 'new').iterdir()) == [tmp_path / 'new' / 'scores.json']
    print_scores(scores)
    assert '100.0 %' in capsys.readouterr().out
