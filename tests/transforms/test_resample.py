from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]
from torchvision.transforms.v2 import functional as tv  # type: ignore[import-untyped]

from geofm.transforms import resample
from geofm.transforms.resample import blur_matrices, crop_and_resize, resize_matrices

HEIGHT, WIDTH = 37, 52


def _apply_to_images(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    rows = resize_matrices(boxes[:, 1], boxes[:, 3], flips[:, 1], images.shape[2], size)
    columns = resize_matrices(boxes[:, 0], boxes[:, 2], flips[:, 0], images.shape[3], size)
    out = images.new_empty(len(boxes), images.shape[1], size, size)
    resample._apply_to_images(images, rows, columns, out)
    return out


def _torchvision(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    crops = []
    for k, (left, top, right, bottom) in enumerate(boxes.tolist()):
        crop = tv.resized_crop(
            images[k % len(images)],
            *(top, left, bottom - top, right - left),
            size=[size, size],
            interpolation=InterpolationMode.BICUBIC,
            antialias=True,
        )
        dims = [dim for dim, flip in zip((-1, -2), flips[k].tolist(), strict=True) if flip]
        crops.append(crop.flip(dims))
    return torch.stack(crops)


@st.composite
def boxes(draw: st.DrawFn) -> list[int]:
    left, top = draw(st.integers(0, WIDTH - 1)), draw(st.integers(0, HEIGHT - 1))
    right, bottom = draw(st.integers(left + 1, WIDTH)), draw(st.integers(top + 1, HEIGHT))
    return [left, top, right, bottom]


@pytest.mark.parametrize('crop', [crop_and_resize, _apply_to_images])
@settings(max_examples=40, deadline=None)
@given(
    box=st.lists(boxes(), min_size=4, max_size=4),
    flip=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=4, max_size=4),
    size=st.integers(1, 64),
)
def test_equals_torchvision(
    crop: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    box: list[list[int]],
    flip: list[tuple[bool, bool]],
    size: int,
) -> None:
    images = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    box_tensor, flip_tensor = torch.tensor(box), torch.tensor(flip)
    expected = _torchvision(images, box_tensor, flip_tensor, size)
    torch.testing.assert_close(
        crop(images, box_tensor, flip_tensor, size), expected, rtol=1e-4, atol=1e-4
    )


def test_whole_pixels_of_same_size_are_copied() -> None:
    images = torch.randn(1, 2, 20, 20)
    box = torch.tensor([[3, 5, 11, 13]])
    crop = crop_and_resize(images, box, torch.zeros(1, 2, dtype=torch.bool), 8)
    torch.testing.assert_close(crop, images[:, :, 5:13, 3:11], rtol=0, atol=1e-6)


def test_boxes_may_lie_between_pixels() -> None:
    # A ramp stays a ramp, except near the ends, where the filter is cut off.
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    box = torch.tensor([[10.25, 4.0, 42.25, 36.0]])
    crop = crop_and_resize(ramp, box, torch.zeros(1, 2, dtype=torch.bool), 32)
    expected = 10.25 + torch.arange(32.0)
    torch.testing.assert_close(crop[0, 0, 0, 3:-3], expected[3:-3], rtol=0, atol=1e-4)


def test_blur_is_a_gaussian_of_the_given_width() -> None:
    size, sigma = 63, torch.tensor([0.7, 2.0, 3.1])
    impulse = torch.zeros(1, 1, size, size)
    impulse[..., size // 2, size // 2] = 1
    box = torch.tensor([[0, 0, size, size]]).expand(3, 4)
    crops = crop_and_resize(impulse, box, torch.zeros(3, 2, dtype=torch.bool), size, sigma)
    offset = torch.arange(size) - size // 2
    variance = (crops[:, 0].sum(1) * offset**2).sum(1)
    torch.testing.assert_close(crops.sum((1, 2, 3)), torch.ones(3))
    torch.testing.assert_close(variance, sigma**2, rtol=0.02, atol=0)
    torch.testing.assert_close(crops, crops.mT)


def test_blur_follows_the_crop() -> None:
    images = torch.randn(2, 3, HEIGHT, WIDTH)
    box = torch.tensor([[2, 3, 30, 20], [0, 0, 52, 37], [20, 10, 50, 30], [5, 5, 9, 9]])
    flips = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    sigma = torch.tensor([0.0, 1.5, 0.4, 2.0])
    sharp = crop_and_resize(images, box, flips, 24)
    blurred = crop_and_resize(images, box, flips, 24, sigma)
    torch.testing.assert_close(blurred[0], sharp[0], rtol=0, atol=0)
    blur = blur_matrices(sigma[1:], 24)[:, None]
    torch.testing.assert_close(blurred[1:], blur @ sharp[1:] @ blur.mT, rtol=1e-4, atol=1e-5)


def test_blur_makes_no_denormal_numbers() -> None:
    weights = blur_matrices(torch.linspace(0.1, 2, 50), 96)
    assert weights[weights > 0].min() > 1e-8
    torch.testing.assert_close(weights.sum(-1), torch.ones(50, 96))


def test_pixels_outside_the_box_have_no_effect() -> None:
    images = torch.randn(1, 2, 40, 40)
    box = torch.tensor([[8, 12, 30, 31]])
    flips = torch.zeros(1, 2, dtype=torch.bool)
    changed = torch.full_like(images, 1e6)
    changed[..., 12:31, 8:30] = images[..., 12:31, 8:30]
    sigma = torch.tensor([2.0])
    for crop in (crop_and_resize, _apply_to_images):
        assert torch.equal(crop(images, box, flips, 16), crop(changed, box, flips, 16))
    assert torch.equal(
        crop_and_resize(images, box, flips, 16, sigma),
        crop_and_resize(changed, box, flips, 16, sigma),
    )


def test_autocast_does_not_coarsen_pixels() -> None:
    images = torch.randn(1, 2, 40, 40)
    box, flips = torch.tensor([[8, 12, 30, 31]]), torch.zeros(1, 2, dtype=torch.bool)
    expected = crop_and_resize(images, box, flips, 16)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(crop_and_resize(images, box, flips, 16), expected)


def test_no_crops() -> None:
    images = torch.randn(2, 3, 20, 20)
    box, flips = torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 2, dtype=torch.bool)
    assert crop_and_resize(images, box, flips, 8, torch.zeros(0)).shape == (0, 3, 8, 8)
