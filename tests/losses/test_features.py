"""FeatureLoss against its formulas in NumPy."""

import numpy as np
import pytest
import torch

from geofm.losses import FeatureLoss


def test_it_is_the_loss_of_the_formula_on_standardised_features() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [3 * torch.randn(10, 6, generator=generator) + 2 for _ in range(4)]
    predictions = torch.randn(10, 6, generator=generator)
    loss = FeatureLoss(6, momentum=0.4)
    mean, square = np.zeros(6), np.ones(6)
    for i, batch in enumerate(batches):
        loss.update(batch)
        share = max(1 / (i + 1), 0.4)
        values = batch.double().numpy()
        mean += share * (values.mean(axis=0) - mean)
        square += share * ((values**2).mean(axis=0) - square)
    targets = (batches[0].double().numpy() - mean) / np.sqrt(square - mean**2)
    np.testing.assert_allclose(loss.standardized(batches[0]).numpy(), targets, rtol=1e-4)
    p = predictions.double().numpy()
    lengths = np.linalg.norm(p, axis=1) * np.linalg.norm(targets, axis=1)
    error = np.abs(p - targets)
    smooth = np.where(error < 1, error**2 / 2, error - 0.5).mean(axis=1)
    rows = 1 - (p * targets).sum(axis=1) / lengths + smooth
    assert loss(predictions, batches[0]).item() == pytest.approx(rows.mean(), rel=1e-5)
    some = torch.arange(10) < 3
    assert loss(predictions, batches[0], some).item() == pytest.approx(rows[:3].mean(), rel=1e-5)


def test_rows_that_do_not_count_change_nothing() -> None:
    features = torch.randn(8, 4, requires_grad=True)
    counted = torch.arange(8) < 5
    with_them, without = FeatureLoss(4), FeatureLoss(4)
    with_them.update(features, counted)
    without.update(features[:5])
    for name, value in without.named_buffers():
        torch.testing.assert_close(with_them.get_buffer(name), value)
    none = torch.zeros(8, dtype=torch.bool)
    before = {name: value.clone() for name, value in with_them.named_buffers()}
    with_them.update(features, none)
    assert all(torch.equal(value, before[name]) for name, value in with_them.named_buffers())
    assert with_them(features, features.detach(), none) == 0


def test_a_constant_channel_is_not_blown_up() -> None:
    features = torch.randn(100, 4)
    features[:, 0] = 7
    loss = FeatureLoss(4)
    loss.update(features)
    assert loss.standardized(features + 1e-4)[:, 0].abs().max() < 0.1
