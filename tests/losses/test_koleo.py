"""lightly's KoLeo loss against DINOv2's: minus the mean log distance to the nearest neighbour."""

import numpy as np
import pytest
import torch
from lightly.loss import KoLeoLoss


def koleo(features: np.ndarray, eps: float = 1e-8) -> float:
    """Reference: for x on the sphere, ``-mean_i log(min_j |x_i - x_j + eps| + eps)``."""
    points = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), eps)
    terms = []
    for i, point in enumerate(points):
        others = [other for j, other in enumerate(points) if j != i]
        nearest = min(others, key=lambda other: float(np.linalg.norm(point - other)))
        terms.append(np.log(np.linalg.norm(point - nearest + eps) + eps))
    return -float(np.mean(terms))


@pytest.mark.parametrize(('images', 'width'), [(2, 3), (5, 8), (16, 32), (64, 384)])
def test_koleo_is_the_log_distance_to_the_nearest_neighbour(images: int, width: int) -> None:
    features = torch.randn(images, width)
    expected = koleo(features.double().numpy())
    assert KoLeoLoss()(features).item() == pytest.approx(expected, rel=1e-5)
    # Lengths do not matter, directions do.
    scaled = features * torch.rand(images, 1).add(0.1)
    assert KoLeoLoss()(scaled).item() == pytest.approx(expected, rel=1e-4)


def test_two_points_at_a_known_distance() -> None:
    angle = 0.3
    points = torch.tensor([[2.0, 0.0], [3 * np.cos(angle), 3 * np.sin(angle)]])
    chord = 2 * np.sin(angle / 2)
    assert KoLeoLoss()(points).item() == pytest.approx(-np.log(chord), rel=1e-5)


def test_opposite_points_are_not_their_own_neighbours() -> None:
    """Opposite points have a cosine of -1, so the value for a point itself must be lower."""
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert KoLeoLoss()(points).item() == pytest.approx(-np.log(2), rel=1e-5)


def test_images_twice_in_a_batch_give_finite_losses_and_gradients() -> None:
    features = torch.randn(4, 16)
    twice = torch.cat([features, features]).requires_grad_()
    loss = KoLeoLoss()(twice)
    # A distance of eps in each of 16 dimensions, and eps.
    assert loss.item() == pytest.approx(-np.log(5e-8), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, twice)
    assert torch.isfinite(gradient).all()
    nothing = torch.zeros(3, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(KoLeoLoss()(nothing), nothing)
    assert torch.isfinite(gradient).all()
