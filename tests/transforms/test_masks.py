import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from geofm.transforms import block_masks


def test_fraction_of_images_and_range_of_ratios() -> None:
    torch.manual_seed(0)
    n_images, grid = 64, (14, 14)
    masks = block_masks(n_images, grid, 0.5, (0.1, 0.5))
    assert masks.shape == (n_images, 14 * 14)
    assert masks.dtype == torch.bool
    masked = masks.sum(1)
    ratios = (masked[masked > 0] / (14 * 14)).sort().values
    assert len(ratios) == 32
    assert ratios.max() <= 0.5
    # One ratio per interval. Blocks may leave out the last token.
    edges = torch.linspace(0.1, 0.5, 33)
    assert (ratios <= edges[1:] + 1e-6).all()
    assert (ratios >= edges[:-1] - 0.03).all()


def test_masked_images_are_at_random_positions() -> None:
    torch.manual_seed(0)
    hits = torch.stack([block_masks(8, (6, 6), 0.5).any(1) for _ in range(100)]).float().mean(0)
    assert ((hits > 0.3) & (hits < 0.7)).all()


@pytest.mark.parametrize(('n_images', 'probability'), [(2, 0.3), (1, 0.5), (3, 0.5), (2, 0.1)])
def test_probability_is_correct_for_small_batches(n_images: int, probability: float) -> None:
    torch.manual_seed(0)
    n_draws = 400
    masked = sum(
        int(block_masks(n_images, (4, 4), probability, (0.3, 0.5)).any(1).sum())
        for _ in range(n_draws)
    )
    # Four standard deviations of a binomial distribution as an upper bound.
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


def dinov2_mask(rng: random.Random, grid: tuple[int, int], target: int) -> np.ndarray:
    """DINOv2's masking of one image, after BEiT's pseudo-code, token by token.

    Rectangles of an area between 4 and what is still missing, at most half the image, with a
    log-uniform aspect ratio; one that hides nothing new or too much is drawn again, ten times.
    """
    height, width = grid
    hidden: set[tuple[int, int]] = set()
    while len(hidden) < target:
        missing = min(target - len(hidden), height * width // 2)
        for _ in range(10):
            area = rng.uniform(4, missing)
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= height or w >= width:
                continue
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            block = {(top + i, left + j) for i in range(h) for j in range(w)}
            if 0 < len(block - hidden) <= missing:
                hidden |= block
                break
        else:
            break
    mask = np.zeros(grid, dtype=bool)
    for token in hidden:
        mask[token] = True
    return mask


@pytest.mark.parametrize('grid', [(14, 14), (12, 16), (7, 5)])
@pytest.mark.parametrize('ratio', [0.12, 0.3, 0.5, 0.9])
def test_masks_equal_those_of_dinov2_for_the_same_random_numbers(
    grid: tuple[int, int], ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same random numbers in the same order. Blocks cover at most half of the image."""
    seed = random.seed
    for number in range(60):
        monkeypatch.setattr(random, 'seed', lambda _, number=number: seed(number))
        (mask,) = block_masks(1, grid, 1.0, (ratio, ratio)).view(1, *grid).numpy()
        expected = dinov2_mask(random.Random(number), grid, int(ratio * grid[0] * grid[1]))
        np.testing.assert_array_equal(mask, expected)


def pieces(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the number of connected regions, and height, width and tokens of the largest."""
    labels, count = ndimage.label(mask)
    largest = int(np.bincount(labels.flat)[1:].argmax())
    rows, columns = ndimage.find_objects(labels)[largest] or (slice(0), slice(0))
    return (
        count,
        rows.stop - rows.start,
        columns.stop - columns.start,
        int((labels == largest + 1).sum()),
    )


@pytest.mark.parametrize(('grid', 'ratio'), [((14, 14), 0.1), ((12, 16), 0.3), ((14, 14), 0.5)])
def test_masks_have_the_distribution_of_those_of_dinov2(
    grid: tuple[int, int], ratio: float
) -> None:
    """Two-sample tests of masked tokens, regions, and the shape of the largest region."""
    torch.manual_seed(0)
    n, rng = 1200, random.Random(0)
    target = int(ratio * grid[0] * grid[1])
    ours = block_masks(n, grid, 1.0, (ratio, ratio)).view(-1, *grid).numpy()
    theirs = np.stack([dinov2_mask(rng, grid, target) for _ in range(n)])
    missed, missed_by_theirs = (target - masks.sum(axis=(1, 2)) for masks in (ours, theirs))
    assert missed.min() == missed_by_theirs.min() == 0
    counts = np.array([[(x == 0).sum(), (x > 0).sum()] for x in (missed, missed_by_theirs)])
    assert stats.chi2_contingency(counts).pvalue > 1e-3
    shapes = np.array([pieces(mask) for mask in ours])
    expected = np.array([pieces(mask) for mask in theirs])
    for column in range(4):
        assert stats.ks_2samp(shapes[:, column], expected[:, column]).pvalue > 1e-3
    aspects = [np.log(x[:, 1] / x[:, 2]) for x in (shapes, expected)]
    assert stats.ks_2samp(*aspects).pvalue > 1e-3
    # Each token is masked as often as in DINOv2: more often in the centre than at the edges.
    ours_map, theirs_map = ours.mean(axis=0), theirs.mean(axis=0)
    spread = np.sqrt(2 * theirs_map * (1 - theirs_map) / n)
    assert (abs(ours_map - theirs_map) < 5 * spread).all()


def test_numbers_of_masked_tokens_are_uniform_in_each_interval() -> None:
    """Half of 2 x 8 crops are masked, each with a ratio from its own eighth of the range."""
    torch.manual_seed(0)
    grid, draws = (14, 14), 150
    counts = torch.stack([block_masks(16, grid, 0.5, (0.1, 0.5)).sum(dim=1) for _ in range(draws)])
    assert ((counts > 0).sum(dim=1) == 8).all()
    ordered = counts.sort(dim=1).values[:, 8:].double() / 196
    edges = np.linspace(0.1, 0.5, 9)
    for i in range(8):
        shares = ordered[:, i].numpy()
        # A token of 196 may be lost by rounding down, and another one because it does not fit.
        assert (shares <= edges[i + 1]).all()
        assert (shares > edges[i] - 2.1 / 196).all()
        uniform = stats.uniform(edges[i] - 0.5 / 196, 0.05)
        assert stats.kstest(shares, uniform.cdf).statistic < 0.2
