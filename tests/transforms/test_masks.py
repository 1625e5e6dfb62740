import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from geofm.transforms import block_masks


def test_share_of_images_and_range_of_ratios() -> None:
    torch.manual_seed(0)
    n_images, grid = 64, (14, 14)
    masks = block_masks(n_images, grid, 0.5, (0.1, 0.5))
    assert masks.shape == (n_images, 14 * 14)
    assert masks.dtype == torch.bool
    masked = masks.sum(1)
    ratios = (masked[masked > 0] / (14 * 14)).sort().values
    assert len(ratios) == 32
    assert ratios.max() <= 0.5
    # One ratio a slice: the sorted ratios follow the slices' edges, less what a block may miss.
    edges = torch.linspace(0.1, 0.5, 33)
    assert (ratios <= edges[1:] + 1e-6).all()
    assert (ratios >= edges[:-1] - 0.03).all()


def test_masked_images_lie_anywhere() -> None:
    torch.manual_seed(0)
    hits = torch.stack([block_masks(8, (6, 6), 0.5).any(1) for _ in range(100)]).float().mean(0)
    assert ((hits > 0.3) & (hits < 0.7)).all()


@pytest.mark.parametrize(('n_images', 'probability'), [(2, 0.3), (1, 0.5), (3, 0.5), (2, 0.1)])
def test_probability_holds_for_small_batches(n_images: int, probability: float) -> None:
    torch.manual_seed(0)
    n_draws = 400
    masked = sum(
        int(block_masks(n_images, (4, 4), probability, (0.3, 0.5)).any(1).sum())
        for _ in range(n_draws)
    )
    # Binomial at worst: 4 standard deviations.
    total = n_images * n_draws
    spread = 4 * (total * probability * (1 - probability)) ** 0.5
    assert abs(masked - total * probability) < spread


def test_masks_are_blocks() -> None:
    torch.manual_seed(0)
    grid = (14, 14)
    masks = block_masks(40, grid, 1.0, (0.3, 0.3)).view(-1, *grid)
    pieces = [ndimage.label(mask.numpy())[1] for mask in masks]
    scattered = [ndimage.label((torch.rand(grid) < 0.3).numpy())[1] for _ in range(40)]
    assert sum(pieces) / 40 < 6 < 20 < sum(scattered) / 40


@settings(max_examples=50, deadline=None)
@given(
    n_images=st.integers(0, 9),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    probability=st.floats(0, 1),
    low=st.floats(0, 0.5),
)
def test_any_grid(n_images: int, grid: tuple[int, int], probability: float, low: float) -> None:
    masks = block_masks(n_images, grid, probability, (low, 0.5))
    assert masks.shape == (n_images, grid[0] * grid[1])
    assert (masks.sum(1) <= grid[0] * grid[1] / 2).all()
    assert masks.any(1).sum() <= n_images * probability + 1


def test_small_grid_is_masked() -> None:
    torch.manual_seed(0)
    masked = block_masks(32, (4, 4), 1.0, (0.1, 0.5)).sum(1)
    assert masked.min() >= 1
    assert masked.max() >= 6


def test_extremes() -> None:
    assert not block_masks(8, (6, 6), 0.0).any()
    assert block_masks(8, (6, 6), 1.0).any(1).all()


def test_follows_torch_and_leaves_python_random_alone() -> None:
    random.seed(3)
    expected = random.random()
    torch.manual_seed(1)
    random.seed(3)
    first = block_masks(8, (8, 8))
    assert random.random() == expected
    random.seed(4)
    torch.manual_seed(1)
    assert torch.equal(block_masks(8, (8, 8)), first)
    assert not torch.equal(block_masks(8, (8, 8)), first)


@pytest.mark.parametrize('ratio', [(0.5, 0.1), (-0.1, 0.5), (0.1, 1.1)])
def test_bad_ratio(ratio: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match='ratio'):
        block_masks(4, (4, 4), ratio=ratio)


def test_bad_probability() -> None:
    with pytest.raises(ValueError, match='probability'):
        block_masks(4, (4, 4), probability=1.5)
