from typing import Any

import pytest
import torch

from geofm.evaluation import encoder_of, extract_features
from geofm.models import MultiSensorViT
from tests.pairs import RandomPairs


def test_features_come_with_their_labels_in_order() -> None:
    data = RandomPairs(10)
    batches = [torch.utils.data.default_collate([data[i] for i in part]) for part in ([0, 1], [2])]
    backbone = MultiSensorViT(embed_dim=32, depth=1, num_heads=2, patch_size=8).eval()
    features, labels = extract_features(encoder_of(backbone).pooled, batches, lambda batch: batch)
    assert labels.tolist() == [0, 1, 0]
    image, dates = data[2]['image'][None], data[2]['dates'][None]
    torch.testing.assert_close(features[2, 0], backbone(image, dates)[0])
    tokens = backbone.forward_features(image, dates)[0, backbone.num_prefix_tokens :]
    torch.testing.assert_close(features[2, 1], tokens.mean(dim=0))


def test_data_without_labels_or_batches_are_an_error() -> None:
    def encoder(batch: Any) -> torch.Tensor:
        return torch.zeros(1, 2)

    with pytest.raises(ValueError, match="must have a 'label'"):
        extract_features(encoder, [{'image': torch.zeros(1)}], lambda batch: batch)
    with pytest.raises(ValueError, match='data loader is empty'):
        extract_features(encoder, [], lambda batch: batch)
