import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchgeo.datasets import stack_samples

from geofm.datasets import pad_and_stack


def make_sample(height: int, width: int, *keys: str) -> dict[str, Tensor]:
    sample = {
        'image': torch.rand(2, height, width) + 1,
        'valid': torch.rand(height, width) < 0.5,
        'mask': torch.randint(9, (height, width)),
        'dates': torch.randint(20000, (2,)),
        'label': torch.randint(9, ()),
    }
    return {key: sample[key] for key in keys or sample}


def test_samples_of_equal_size_are_stacked_without_padding() -> None:
    samples = [make_sample(4, 5) for _ in range(3)]
    batch, expected = pad_and_stack(samples), stack_samples(samples)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert 'valid' not in pad_and_stack([make_sample(4, 5, 'image')] * 2)


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(st.lists(sizes, min_size=1, max_size=4))
def test_padding_is_invalid_and_pixels_keep_their_position(shapes: list[tuple[int, int]]) -> None:
    samples = [make_sample(*shape) for shape in shapes]
    batch = pad_and_stack(samples)
    rows, cols = (max(lengths) for lengths in zip(*shapes, strict=True))
    assert batch['image'].shape == (len(shapes), 2, rows, cols)
    for i, (sample, (height, width)) in enumerate(zip(samples, shapes, strict=True)):
        for key, fill in (('image', 0), ('valid', False), ('mask', -1)):
            padded = batch[key][i].clone()
            assert padded.dtype == sample[key].dtype
            assert torch.equal(padded[..., :height, :width], sample[key])
            padded[..., :height, :width] = fill
            assert (padded == fill).all()
        assert torch.equal(batch['dates'][i], sample['dates'])
        assert torch.equal(batch['label'][i], sample['label'])


def test_valid_is_added_where_sizes_differ() -> None:
    batch = pad_and_stack([make_sample(4, 5, 'image'), make_sample(3, 7, 'image')])
    assert batch['valid'].sum((1, 2)).tolist() == [20, 21]
    assert batch['valid'].dtype == torch.bool


def test_ignore_index() -> None:
    batch = pad_and_stack([make_sample(2, 2), make_sample(1, 2)], ignore_index=255)
    assert (batch['mask'][1, 1] == 255).all()


def test_other_entries_must_have_one_shape() -> None:
    samples = [{**make_sample(2, 2, 'image'), 'dates': torch.zeros(n)} for n in (1, 2)]
    with pytest.raises(RuntimeError, match='equal size'):
        pad_and_stack(samples)
