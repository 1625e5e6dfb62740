import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss.swav_loss import sinkhorn

from geofm.losses import EMACentering, SinkhornKnopp


def test_ema_centre_is_the_moving_average_of_earlier_batches() -> None:
    centering = EMACentering(prototypes=6, momentum=0.9)
    centre = np.zeros(6)
    for _ in range(4):
        logits = torch.randn(5, 6)
        shifted = (logits.numpy() - centre) / 0.05
        weights = np.exp(shifted - shifted.max(axis=1, keepdims=True))
        expected = weights / weights.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(centering(logits, 0.05).numpy(), expected, atol=1e-5)
        centering.update(logits)
        centre = 0.9 * centre + 0.1 * logits.numpy().mean(axis=0)
    np.testing.assert_allclose(centering.center.value[0].numpy(), centre, atol=1e-6)


def test_ema_centre_stays_where_it_is_when_told_or_when_there_is_nothing() -> None:
    centering = EMACentering(prototypes=6)
    centering.update(torch.randn(5, 6))
    centre = centering.center.value.clone()
    centering(torch.randn(5, 6), 0.05)
    assert centering(torch.randn(0, 6), 0.05).shape == (0, 6)
    centering.update(torch.randn(0, 6))
    torch.testing.assert_close(centering.center.value, centre)


def test_sinkhorn_is_that_of_the_paper() -> None:
    logits, temperature = torch.randn(8, 5), 0.5
    q = np.exp(logits.double().numpy() / temperature).T  # prototypes x samples
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(axis=1, keepdims=True) * q.shape[0]
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
    expected = (q * q.shape[1]).T
    targets = SinkhornKnopp(5, iterations=3)(logits, temperature)
    np.testing.assert_allclose(targets.numpy(), expected, rtol=1e-4)
    torch.testing.assert_close(targets, sinkhorn(logits, 3, temperature), rtol=1e-4, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(2, 12), st.integers(0, 10_000))
def test_sinkhorn_gives_probabilities_that_use_all_prototypes(m: int, k: int, seed: int) -> None:
    logits = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    targets = SinkhornKnopp(k, iterations=50)(logits, 1.0)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(m))
    torch.testing.assert_close(targets.sum(dim=0), torch.full((k,), m / k), rtol=1e-3, atol=1e-3)


def test_sinkhorn_survives_logits_that_exp_does_not() -> None:
    targets = SinkhornKnopp(4)(torch.tensor([[100.0, 0, 0, 0], [0, 100, 0, 0]]), 0.04)
    assert torch.isfinite(targets).all()
    assert SinkhornKnopp(4)(torch.zeros(0, 4), 0.04).shape == (0, 4)
