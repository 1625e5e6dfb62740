"""Block masks over patch tokens for the iBOT loss."""

import random

import torch
from lightly.models.utils import random_block_mask_image
from torch import Tensor

#: Smallest block, in tokens, as in DINOv2.
SMALLEST_BLOCK = 4

#: So often an image is masked again if no block found room, as happens on the smallest grids.
MAX_ROUNDS = 10


def block_masks(
    n_images: int,
    grid: tuple[int, int],
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> Tensor:
    """Draw DINOv2's block masks.

    A fraction of the images is masked. The range of ratios is cut into as many equal slices as
    images are masked, and each of these draws its own ratio in its own slice, so that every batch
    covers the range evenly. Blocks of tokens with an aspect ratio of 0.3 to 1 / 0.3 are then masked
    until the number is reached or ten blocks in a row find no room, as one in ten times the last
    token does not. The masked images lie at random places in the batch.

    From Oquab et al., `DINOv2 <https://arxiv.org/abs/2304.07193>`_, after Zhou et al.,
    `iBOT <https://arxiv.org/abs/2111.07832>`_; blocks as in Bao et al.,
    `BEiT <https://arxiv.org/abs/2106.08254>`_.

    Args:
        n_images: Number of images N.
        grid: Number of patch tokens down and across (h, w).
        probability: Fraction of the images to mask; rounded to whole images at random, so that it
            holds on average.
        ratio: Lowest and highest fraction of an image's tokens to mask.

    Returns:
        True where a token is masked, bool, shape (N, h * w), on the CPU. No image has more masked
        tokens than its ratio asks for. Reproducible through ``torch.manual_seed``.

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
    # lightly draws from Python's generator; ours follows torch's, and leaves the user's alone.
    state = random.getstate()
    random.seed(int(torch.randint(2**62, ()).item()))
    try:
        for place, share in zip(places.tolist(), ratios.tolist(), strict=True):
            masks[place] = _mask_image(grid, int(share * grid[0] * grid[1]))
    finally:
        random.setstate(state)
    return masks.flatten(1)


def _mask_image(grid: tuple[int, int], n_tokens: int) -> Tensor:
    """Mask blocks of one image until *n_tokens* are masked, or a block finds no room."""
    # No block covers more than half the image; one of few tokens may be larger than these.
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
