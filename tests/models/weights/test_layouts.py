"""Layouts of a ViT, told apart and turned into one another."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from geofm.models.weights.layouts import find_vit, fold_positions, to_dinov2

WIDTH = 4


def weights(patches: int, registers: int, positions: int) -> dict[str, torch.Tensor]:
    """As little as a ViT needs to be one."""
    tensors = {
        'cls_token': torch.randn(1, 1, WIDTH),
        'pos_embed': torch.randn(1, positions + patches, WIDTH),
        'patch_embed.proj.weight': torch.randn(WIDTH, 3, 2, 2),
        'blocks.0.mlp.fc1.weight': torch.randn(8, WIDTH),
        'blocks.0.mlp.fc2.weight': torch.randn(WIDTH, 8),
    }
    if registers:
        tensors['reg_token'] = torch.randn(1, registers, WIDTH)
    return tensors


def is_square(n: int) -> bool:
    return round(n**0.5) ** 2 == n


@settings(deadline=None)
@given(side=st.integers(2, 40), registers=st.integers(0, 8), which=st.integers(0, 2))
def test_positions_of_tokens_are_added_to_them(side: int, registers: int, which: int) -> None:
    positions = (0, 1, 1 + registers)[which]
    patches = side * side
    # On tiny grids a number can be read in two ways.
    assume(not any(is_square(patches + positions - n) for n in (0, 1) if n < positions))
    tensors = weights(patches, registers, positions)
    folded = fold_positions(tensors, (7, 7))
    pos = tensors['pos_embed']
    for row in range(side):
        expected = pos[0, positions + row * side : positions + (row + 1) * side]
        assert torch.equal(folded['pos_embed'][0, row], expected)
    cls = tensors['cls_token'] + (pos[:, :1] if positions else 0)
    assert torch.equal(folded['cls_token'], cls)
    if registers:
        added = pos[:, 1 : 1 + registers] if positions > 1 else 0
        assert torch.equal(folded['reg_token'], tensors['reg_token'] + added)


def test_a_grid_that_is_not_square_is_the_models() -> None:
    tensors = weights(6, 4, 5)
    assert fold_positions(tensors, (2, 3))['pos_embed'].shape == (1, 2, 3, WIDTH)


@settings(deadline=None)
@given(side=st.integers(2, 12), registers=st.integers(0, 8), gated=st.booleans())
def test_to_dinov2_and_back_is_what_it_was(side: int, registers: int, gated: bool) -> None:
    tensors = weights(side * side, registers, 0)
    if gated:
        tensors['blocks.0.mlp.fc1.weight'] = torch.randn(16, WIDTH)
    mask_token = torch.randn(WIDTH)
    folded = fold_positions(tensors, (side, side))
    written = to_dinov2(folded, mask_token)
    assert written['pos_embed'].shape == (1, 1 + side * side, WIDTH)
    assert ('blocks.0.mlp.w12.weight' in written) == gated
    back = find_vit(written)
    assert torch.equal(back.pop('mask_token')[0], mask_token)
    back = fold_positions(back, (side, side))
    assert back.keys() == folded.keys()
    assert all(torch.equal(back[key], folded[key]) for key in folded)
