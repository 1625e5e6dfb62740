import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from geofm.sensors import BANDS, BandError
from geofm.transforms import Crops, MultiCrop
from geofm.transforms.multicrop import integral_image, valid_share
from geofm.transforms.resample import _apply_to_images, crop_and_resize, resize_matrices

S1 = [BANDS.index(band) for band in ('VV', 'VH')]
S2 = [channel for channel in range(len(BANDS)) if channel not in S1]


def _coordinates(batch: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images whose bands are affine functions of the pixel's position, with their factors.

    Returns:
        Images (B, C, H, W), and per image and channel the factors of x and of y, each (B, C).
    """
    generator = torch.Generator().manual_seed(0)
    by_x = 0.5 + torch.rand(batch, len(BANDS), generator=generator)
    by_y = 0.5 + torch.rand(batch, len(BANDS), generator=generator)
    x = torch.arange(width) + 0.5
    y = torch.arange(height).view(-1, 1) + 0.5
    images = by_x[..., None, None] * x + by_y[..., None, None] * y
    return images, by_x, by_y


def _solve(crops: Tensor, by_x: Tensor, by_y: Tensor, first: int, second: int) -> Tensor:
    """Return the position on the ground (N, 2, S, S) that two bands of crops encode."""
    n_crops = len(crops) // len(by_x)
    channels = [first, second]
    matrix = torch.stack([by_x[:, channels], by_y[:, channels]], dim=-1).repeat(n_crops, 1, 1)
    return torch.einsum(
        'nij,njhw->nihw', torch.linalg.inv(matrix.double()), crops[:, channels].double()
    )


def _expected_position(boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Compute the centre of each crop pixel on the ground, (N, 2, S, S)."""
    grids = []
    for (left, top, right, bottom), (flip_x, flip_y) in zip(
        boxes.tolist(), flips.tolist(), strict=True
    ):
        x = left + (torch.arange(size) + 0.5) * (right - left) / size
        y = top + (torch.arange(size) + 0.5) * (bottom - top) / size
        x = x.flip(0) if flip_x else x
        y = y.flip(0) if flip_y else y
        grids.append(torch.stack(torch.meshgrid(x, y, indexing='xy')))
    return torch.stack(grids).double()


@pytest.mark.parametrize(('height', 'width'), [(64, 64), (61, 83)])
def test_all_bands_show_the_same_ground(height: int, width: int) -> None:
    torch.manual_seed(0)
    images, by_x, by_y = _coordinates(3, height, width)
    crops = MultiCrop(BANDS, 48, 32, n_local=6, photometry=False)({'image': images})
    for views, boxes, flips in (
        (crops.globals, crops.global_boxes, crops.global_flips),
        (crops.locals, crops.local_boxes, crops.local_flips),
    ):
        from_s1 = _solve(views, by_x, by_y, *S1)
        expected = _expected_position(boxes, flips, views.shape[-1])
        # Each band is a function of the position that Sentinel-1 encodes.
        n_crops = len(views) // 3
        every = by_x.repeat(n_crops, 1)[..., None, None] * from_s1[:, :1]
        every = every + by_y.repeat(n_crops, 1)[..., None, None] * from_s1[:, 1:]
        assert (every - views).abs().max() < 2e-3
        # The position is that of the box and flips, except within 3 pixels of the border, where
        # the filter is cut off.
        inner = slice(6, -6)
        error = (from_s1 - expected)[..., inner, inner].abs().max()
        assert error < 0.1
        assert (from_s1 - expected).abs().max() < 1.0
        assert flips.float().mean(0).gt(0).all()
        assert flips.float().mean(0).lt(1).all()


def test_crops_differ_between_images_and_between_crops() -> None:
    torch.manual_seed(0)
    crops = MultiCrop(BANDS, 32, 32, n_local=4)({'image': torch.randn(4, len(BANDS), 64, 64)})
    assert len(crops.local_boxes.unique(dim=0)) == 16
    assert len(crops.global_boxes.unique(dim=0)) == 8


def test_shapes_and_order() -> None:
    images = torch.zeros(3, len(BANDS), 40, 56)
    images += torch.arange(3).view(-1, 1, 1, 1)
    dates = torch.tensor([[17_500, 17_504]]) + torch.arange(3).view(3, 1)
    batch = {'image': images, 'dates': dates}
    crops = MultiCrop(BANDS, 64, 32, n_local=5, patch_size=8, photometry=False)(batch)
    assert crops.globals.shape == (6, len(BANDS), 64, 64)
    assert crops.locals.shape == (15, len(BANDS), 32, 32)
    assert crops.masks.shape == (6, 64)
    assert crops.masks.dtype == torch.bool
    assert crops.global_dates is not None
    assert crops.local_dates is not None
    assert torch.equal(crops.global_dates, dates.repeat(2, 1))
    assert torch.equal(crops.local_dates, dates.repeat(5, 1))
    for views in (crops.globals, crops.locals):  # Crop-major.
        image_of_crop = torch.arange(3.0).repeat(len(views) // 3)
        torch.testing.assert_close(views.mean((1, 2, 3)), image_of_crop)


def test_boxes_have_the_requested_area_and_aspect_ratio() -> None:
    torch.manual_seed(0)
    batch = {'image': torch.zeros(100, 2, 96, 96)}
    crops = MultiCrop(('VV', 'VH'), 32, 16, photometry=False)(batch)
    for boxes, (low, high) in ((crops.global_boxes, (0.32, 1)), (crops.local_boxes, (0.05, 0.32))):
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= 96).all()
        # Some boxes are next to each border.
        assert (boxes[:, :2].amin(0) == 0).all()
        assert (boxes[:, 2:].amax(0) == 96).all()
        width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        share = width * height / 96**2
        assert low - 0.03 < share.min() < low + 0.05
        assert high - 0.15 < share.max() < high + 0.03
        ratio = width / height
        assert ratio.min() < 0.85
        assert ratio.max() > 1.2
        assert ratio.min() > 0.7
        assert ratio.max() < 1.43


def test_crops_without_enough_valid_ground_are_drawn_again() -> None:
    torch.manual_seed(0)
    images = torch.zeros(16, 2, 64, 64)
    valid = torch.zeros(16, 64, 64, dtype=torch.bool)
    valid[:, :, :32] = True
    crop = MultiCrop(('VV', 'VH'), 32, 16, min_valid=0.7, max_tries=30, photometry=False)
    once = MultiCrop(('VV', 'VH'), 32, 16, min_valid=0.7, max_tries=1, photometry=False)
    batch = {'image': images, 'valid': valid}
    crops = crop(batch)
    assert crops.local_valid_share.min() >= 0.7
    assert (once(batch).local_valid_share < 0.7).float().mean() > 0.25
    for k, (left, top, right, bottom) in enumerate(crops.local_boxes.tolist()):
        share = valid[k % 16, top:bottom, left:right].float().mean().item()
        assert crops.local_valid_share[k].item() == pytest.approx(share, abs=1e-6)


def test_crops_with_enough_valid_ground_are_not_drawn_again() -> None:
    # Choosing among several valid tries would favour the centre of the image.
    torch.manual_seed(0)
    valid = torch.ones(64, 64, 64, dtype=torch.bool)
    valid[:, :, ::8] = False
    valid[:, :8] = False
    batch = {'image': torch.zeros(64, 2, 64, 64), 'valid': valid}
    means = []
    for max_tries in (1, 10):
        crop = MultiCrop(('VV', 'VH'), 32, 16, min_valid=0.0, max_tries=max_tries)
        means.append(crop(batch).local_valid_share.mean().item())
    assert means[0] == pytest.approx(means[1], abs=0.02)


def test_the_best_of_the_tries_is_kept() -> None:
    torch.manual_seed(0)
    valid = torch.zeros(8, 64, 64, dtype=torch.bool)
    valid[:, 20:30, 20:30] = True  # Nowhere enough.
    batch = {'image': torch.zeros(8, 2, 64, 64), 'valid': valid}
    many = MultiCrop(('VV', 'VH'), 32, 16, max_tries=40, photometry=False)(batch)
    few = MultiCrop(('VV', 'VH'), 32, 16, max_tries=1, photometry=False)(batch)
    assert (many.local_valid_share < 0.5).all()
    assert many.local_valid_share.min() > 0.1
    assert few.local_valid_share.min() == 0


def test_no_valid_ground_at_all() -> None:
    batch = {'image': torch.zeros(2, 2, 64, 64), 'valid': torch.zeros(2, 64, 64).bool()}
    crops = MultiCrop(('VV', 'VH'), 32, 16)(batch)
    assert (crops.global_valid_share == 0).all()
    assert crops.globals.isfinite().all()


def test_valid_share_equals_counting() -> None:
    torch.manual_seed(0)
    valid = torch.rand(2, 13, 17) < 0.5
    boxes = torch.tensor([[[0, 0, 17, 13], [3, 2, 4, 3], [5, 0, 9, 13], [16, 12, 17, 13]]])
    shares = valid_share(integral_image(valid), boxes, torch.arange(4) % 2)
    for k, (left, top, right, bottom) in enumerate(boxes[0].tolist()):
        expected = valid[k % 2, top:bottom, left:right].float().mean().item()
        assert shares[0, k].item() == pytest.approx(expected, abs=1e-6)


def test_blur_of_sentinel_2_can_be_less() -> None:
    torch.manual_seed(0)
    crop = MultiCrop(BANDS, 32, 32, photometry={'blur': (0.0, 0.0), 'probability': 0.0})
    images = torch.randn(20, len(BANDS), 48, 48)
    crops = crop({'image': images})
    sharp = crop_and_resize(images, crops.global_boxes, crops.global_flips, 32)
    torch.testing.assert_close(crops.globals[:, S2], sharp[:, S2])
    assert not torch.allclose(crops.globals[:20, S1], sharp[:20, S1], atol=1e-2)


def test_blur_is_as_frequent_as_in_dinov2() -> None:
    torch.manual_seed(0)
    crop = MultiCrop(BANDS, 32, 32, n_local=4)
    assert crop.photometry is not None
    crop.photometry = torch.nn.Identity()  # type: ignore[assignment]
    images = torch.randn(200, len(BANDS), 48, 48)
    crops = crop({'image': images})
    for channels in (S1, S2):
        sharp_globals = crop_and_resize(images, crops.global_boxes, crops.global_flips, 32)
        sharp_locals = crop_and_resize(images, crops.local_boxes, crops.local_flips, 32)
        blurred = (crops.globals - sharp_globals)[:, channels].abs().amax((1, 2, 3)) > 1e-3
        # Standard deviations near 0.1 have no effect: 0.1 of 1.9 pixels, 0.1 of 0.9.
        assert blurred[:200].float().mean() > 0.75
        assert 0.03 < blurred[200:].float().mean() < 0.17
        blurred = (crops.locals - sharp_locals)[:, channels].abs().amax((1, 2, 3)) > 1e-3
        assert 0.35 < blurred.float().mean() < 0.55


@pytest.mark.parametrize('bands', [('VV', 'VH'), ('B04', 'B03', 'B02'), ('B04', 'VV', 'B02', 'VH')])
def test_any_bands(bands: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, len(bands), 40, 40)
    crop = MultiCrop(bands, 32, 16, n_local=2)
    crop.photometry = torch.nn.Identity()  # type: ignore[assignment]
    crops = crop({'image': images})
    sharp = crop_and_resize(images, crops.global_boxes, crops.global_flips, 32)
    # A band of a crop is most similar to the same band in the box, even if it is blurred.
    for channel in range(len(bands)):
        blurred, expected = crops.globals[:, channel].flatten(), sharp[:, channel].flatten()
        assert torch.corrcoef(torch.stack([blurred, expected]))[0, 1] > 0.5


def _tensors(crops: Crops) -> dict[str, Any]:
    parts = {field.name: getattr(crops, field.name) for field in dataclasses.fields(crops)}
    return {name: part for name, part in parts.items() if part is not None}


def test_same_seed_same_crops() -> None:
    batch = {
        'image': torch.randn(2, len(BANDS), 40, 40),
        'valid': torch.rand(2, 40, 40) < 0.6,
        'dates': torch.zeros(2, 2).long(),
    }
    crop = MultiCrop(BANDS, 32, 16, n_local=3, anchor_size=48)
    results = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        results.append(_tensors(crop(batch)))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    assert not torch.equal(results[0]['globals'], results[2]['globals'])


def test_masked_are_the_places_of_the_masks_and_anchors_the_crops_without_photometry() -> None:
    crop = MultiCrop(BANDS, 32, 16, n_local=1, photometry=False, anchor_size=32)
    crops = crop({'image': torch.randn(3, len(BANDS), 40, 40)})
    assert torch.equal(crops.masks.flatten().nonzero()[:, 0], crops.masked)
    assert crops.anchors is not None
    torch.testing.assert_close(crops.anchors, crops.globals)


def test_the_input_is_not_changed() -> None:
    images = torch.randn(2, len(BANDS), 40, 40)
    before = images.clone()
    MultiCrop(BANDS, 32, 16)({'image': images})
    assert torch.equal(images, before)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_follows_the_image(dtype: torch.dtype) -> None:
    crops = MultiCrop(BANDS, 32, 16)({'image': torch.randn(1, len(BANDS), 40, 40, dtype=dtype)})
    assert crops.globals.dtype == crops.locals.dtype == dtype


def test_no_local_crops() -> None:
    crops = MultiCrop(BANDS, 32, 16, n_local=0)({'image': torch.randn(2, len(BANDS), 40, 40)})
    assert crops.locals.shape == (0, len(BANDS), 16, 16)
    assert crops.global_dates is None
    assert crops.local_dates is None


def test_the_state_is_empty() -> None:
    assert not MultiCrop(BANDS).state_dict()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'global_size': 200}, 'global_size'),
        ({'local_size': 0}, 'local_size'),
        ({'n_local': -1}, 'n_local'),
        ({'max_tries': 0}, 'max_tries'),
        ({'min_valid': 1.5}, 'min_valid'),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiCrop(BANDS, **arguments)


def test_wrong_number_of_channels() -> None:
    with pytest.raises(BandError, match='B04'):
        MultiCrop(('B04', 'B03'))({'image': torch.zeros(1, 3, 40, 40)})


def dated_batch(n_images: int, n_dates: int, size: int = 48) -> dict[str, torch.Tensor]:
    """Images whose pixels encode row, column, image and date."""
    rows = torch.arange(size, dtype=torch.float32).view(size, 1).expand(size, size)
    image = torch.arange(n_images, dtype=torch.float32).view(-1, 1, 1, 1)
    date = torch.arange(n_dates, dtype=torch.float32).view(1, -1, 1, 1)
    planes = [plane.expand(n_images, n_dates, size, size) for plane in (rows, rows.mT, image, date)]
    days = 100 * torch.arange(n_images).view(-1, 1, 1) + torch.arange(n_dates).view(1, -1, 1)
    return {
        'image': torch.stack(planes, dim=2),
        'dates': days + torch.tensor([0, 50]),
        'valid': torch.ones(n_images, n_dates, size, size, dtype=torch.bool),
    }


@pytest.mark.parametrize('n_dates', [1, 2, 3])
def test_global_crops_take_the_dates_in_turn_and_local_ones_at_random(n_dates: int) -> None:
    torch.manual_seed(0)
    crop = MultiCrop(('VV', 'VH', 'B03', 'B02'), 16, 16, n_local=6, photometry=False)
    batch = dated_batch(5, n_dates)
    crops = crop(batch)
    assert crops.globals.shape == (10, 4, 16, 16)
    assert crops.locals.shape == (30, 4, 16, 16)
    drawn = []
    for views, dates in ((crops.globals, crops.global_dates), (crops.locals, crops.local_dates)):
        assert dates is not None
        for k, view in enumerate(views):
            # All bands of a crop are of one image and date, and the crop has this date.
            image, date = round(view[2].mean().item()), round(view[3].mean().item())
            torch.testing.assert_close(view[2], torch.full((16, 16), float(image)))
            torch.testing.assert_close(view[3], torch.full((16, 16), float(date)))
            assert image == k % 5
            assert torch.equal(dates[k], batch['dates'][image, date])
            drawn.append(date)
    assert drawn[:10] == [0] * 5 + [1 % n_dates] * 5
    assert set(drawn[10:]) == set(range(n_dates))


def test_crops_of_several_dates_show_the_ground_of_their_boxes() -> None:
    """Ramps of two dates are cropped at the positions of the boxes, in all bands."""
    torch.manual_seed(0)
    crop = MultiCrop(('VV', 'VH', 'B03', 'B02'), 16, 16, n_local=4, photometry=False)
    crops = crop(dated_batch(3, 2))
    for views, boxes, flips in (
        (crops.globals, crops.global_boxes, crops.global_flips),
        (crops.locals, crops.local_boxes, crops.local_flips),
    ):
        for view, (left, top, right, bottom), (across, down) in zip(
            views, boxes.tolist(), flips.tolist(), strict=True
        ):
            rows = top - 0.5 + (torch.arange(16) + 0.5) * (bottom - top) / 16
            cols = left - 0.5 + (torch.arange(16) + 0.5) * (right - left) / 16
            rows, cols = rows.flip(0) if down else rows, cols.flip(0) if across else cols
            inner = slice(3, -3)
            expected = rows.view(16, 1).expand(16, 16)
            torch.testing.assert_close(
                view[0, inner, inner], expected[inner, inner], atol=0.05, rtol=0
            )
            expected = cols.expand(16, 16)
            torch.testing.assert_close(
                view[1, inner, inner], expected[inner, inner], atol=0.05, rtol=0
            )


def test_one_date_is_equivalent_to_no_axis_of_dates() -> None:
    batch = {
        'image': torch.randn(3, len(BANDS), 40, 40),
        'valid': torch.rand(3, 40, 40) < 0.7,
        'dates': torch.arange(6).view(3, 2),
    }
    crop = MultiCrop(BANDS, 32, 16, n_local=3)
    torch.manual_seed(1)
    plain = _tensors(crop(batch))
    torch.manual_seed(1)
    dated = _tensors(crop({key: value.unsqueeze(1) for key, value in batch.items()}))
    for name, value in plain.items():
        torch.testing.assert_close(dated[name], value)


def test_valid_ground_is_that_of_the_date() -> None:
    torch.manual_seed(0)
    batch = dated_batch(8, 2)
    batch['valid'][:, 1] = False
    crops = MultiCrop(('VV', 'VH', 'B03', 'B02'), 16, 16, n_local=4)(batch)
    assert (crops.global_valid_share[:8] == 1).all()
    assert (crops.global_valid_share[8:] == 0).all()
    assert crops.local_dates is not None
    second = crops.local_dates[:, 0] % 100 == 1
    assert torch.equal(crops.local_valid_share == 0, second)


def test_crops_of_several_dates_are_the_same_on_an_accelerator() -> None:
    """On accelerators whole images are resized, with the same result."""
    torch.manual_seed(0)
    images = torch.randn(6, 3, 20, 24)
    boxes = torch.tensor([[0, 0, 24, 20], [3, 2, 17, 19], [5, 0, 9, 13], [0, 7, 20, 20]] * 2)
    flips = torch.rand(8, 2) < 0.5
    source = torch.tensor([5, 0, 3, 3, 1, 2, 4, 0])
    expected = crop_and_resize(images, boxes, flips, 8, source=source)
    rows = resize_matrices(boxes[:, 1], boxes[:, 3], flips[:, 1], 20, 8)
    columns = resize_matrices(boxes[:, 0], boxes[:, 2], flips[:, 0], 24, 8)
    out = torch.empty_like(expected)
    _apply_to_images(images, rows, columns, out, source)
    torch.testing.assert_close(out, expected)
