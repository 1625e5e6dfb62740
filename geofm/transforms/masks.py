"""Block masks over patch tokens for the iBOT loss."""

import random

import torch
from lightly.models.utils import random_block_mask_image
from torch import Tensor

#: Minimum number of tokens of a block, as in DINOv2.
SMALLEST_BLOCK = 4

#: Maximum number of attempts to mask an image if no block fits, as may happen on small grids.
MAX_ROUNDS = 10


def block_masks(
    n_images: int,
    grid: tuple[int, int],
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> Tensor:
    """Draw the block masks of DINOv2.

    A fraction of the images, at random positions in the batch, is masked. The range of ratios is
    divided into equal intervals, one per masked image, and the ratio of each image is drawn from
    its own interval, so that each batch covers the range evenly. Then blocks of tokens with an
    aspect ratio of 0.3 to 1 / 0.3 are masked until the ratio is reached, or ten blocks in a row do
    not fit. In about a tenth of the images, the latter leaves one token too few masked.

    From Oquab et al., `DINOv2 <https://arxiv.org/abs/2304.07193>`_, after Zhou et al.,
    `iBOT <https://arxiv.org/abs/2111.07832>`_; blocks as in Bao et al.,
    `BEiT <https://arxiv.org/abs/2106.08254>`_.

    Args:
        n_images: Number of images N.
        grid: Height and width of the grid of patch tokens (h, w).
        probability: Fraction of the images to mask. The number of images is rounded up or down at
            random, so that the fraction is correct on average.
        ratio: Lowest and highest fraction of the tokens of an image to mask.

    Returns:
        Masks, True for masked tokens, bool, shape (N, h * w), on the CPU. The fraction of masked
        tokens of an image does not exceed its ratio. Reproducible with ``torch.manual_seed``.

    Raises:
        ValueError: If *probability* or *ratio* is not within 0 and 1, or *ratio* is not ascending.
    """
    low, high = ratio
    if not 0 <= probability <= 1:
        raise ValueError(f'probability must lie within 0 and 1, got {probability}')
    if not 0 <= low <= high <= 1:
        raise ValueError(f'ratio must be ascending and lie within 0 and 1, got {ratio}')
    n_masked = int(n_images * probability + torch.rand(()).item())
    edges = torch.linspace(low, high, n_masked + 1)
    ratios = edges[:-1] + torch.rand(n_masked) * edges.diff()
    masks = torch.zeros(n_images, *grid, dtype=torch.bool)
    places = torch.randperm(n_images)[:n_masked]
    # lightly uses Python's generator. Seed it from torch's, and restore the state of the user.
    state = random.getstate()
    random.seed(int(torch.randint(2**62, ()).item()))
    try:
        for place, fraction in zip(places.tolist(), ratios.tolist(), strict=True):
            masks[place] = _mask_image(grid, int(fraction * grid[0] * grid[1]))
    finally:
        random.setstate(state)
    return masks.flatten(1)


def _mask_image(grid: tuple[int, int], n_tokens: int) -> Tensor:
    """Mask blocks of an image until *n_tokens* are masked, or no block fits."""
    # At most half of the image, but not less than the minimum.
    largest = max(SMALLEST_BLOCK, min(n_tokens, grid[0] * grid[1] // 2))
    for _ in range(MAX_ROUNDS):
        mask = random_block_mask_image(
            grid,
            n_tokens,
            min_num_masks_per_block=SMALLEST_BLOCK,
            max_num_masks_per_block=largest,
        )
        if n_tokens == 0 or mask.any():
            break
    return mask
