"""Word targets against a computation patch by patch, and the statistics of whitened targets."""

import pytest
import torch
from torch import Tensor

from geofm.losses.word_targets import WordTargets

PATCH = 8


@pytest.fixture(scope='module')
def images() -> Tensor:
    """Textures of different scales and brightness."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(48, 2, 32, 32, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    return torch.where(torch.arange(48)[:, None, None, None] % 2 == 0, noise, 3 * smooth)


@pytest.fixture(scope='module')
def targets(images: Tensor) -> WordTargets:
    targets = WordTargets(2, 8, words=24, dim=6)
    targets.fit([{'image': part} for part in images.split(16)], PATCH)
    return targets


def test_targets_of_what_they_were_learned_from_are_white(
    images: Tensor, targets: WordTargets
) -> None:
    assert bool(targets.fitted)
    found = targets(images, None, PATCH)
    for rows in (*found.patches.flatten(0, 1).unbind(1), found.image):
        assert rows.mean(dim=0).abs().max() < 1e-3
        covariance = torch.cov(rows.T, correction=0)
        torch.testing.assert_close(covariance, torch.eye(6), atol=0.02, rtol=0)


def test_surroundings_are_the_mean_of_the_known_patches_in_reach(
    images: Tensor, targets: WordTargets
) -> None:
    valid = torch.ones(48, 32, 32, dtype=torch.bool)
    valid[:, 8:16, 8:16] = False
    found = targets(images, valid, PATCH)
    codes = targets.words.on_grid(images, (4, 4))[0].square()
    known = torch.ones(4, 4, dtype=torch.bool)
    known[1, 1] = False
    assert torch.equal(found.known, known.flatten().expand(48, -1))
    for row in range(4):
        for column in range(4):
            reach = [
                (r, c)
                for r in range(max(0, row - 1), min(4, row + 2))
                for c in range(max(0, column - 1), min(4, column + 2))
                if known[r, c]
            ]
            mean = torch.stack([codes[:, :, r, c] for r, c in reach]).mean(dim=0).sqrt()
            wanted = targets.whiten_around(mean)
            torch.testing.assert_close(
                found.patches[:, 4 * row + column, 1], wanted, atol=1e-4, rtol=1e-4
            )


def test_missing_ground_is_no_target(images: Tensor, targets: WordTargets) -> None:
    valid = torch.ones(48, 32, 32, dtype=torch.bool)
    valid[:, :, 20:] = False
    changed = images.clone()
    changed[:, :, :, 20:] = 0
    before, after = targets(images, valid, PATCH), targets(changed, valid, PATCH)
    torch.testing.assert_close(before.image, after.image, atol=1e-5, rtol=1e-5)
    assert torch.equal(before.known.view(48, 4, 4).any(dim=1)[0], torch.tensor([1, 1, 1, 0]) == 1)


def test_too_long_targets_are_refused() -> None:
    with pytest.raises(ValueError, match='need that many words, not 8'):
        WordTargets(2, 8, words=8, dim=9)
