import pytest
import torch

from geofm.sensors import BANDS, BandError, band_statistics
from geofm.transforms import Normalize


def _raw(*shape: int) -> torch.Tensor:
    mean, std = band_statistics(BANDS)
    return mean.view(-1, 1, 1) + std.view(-1, 1, 1) * torch.randn(*shape, len(BANDS), 6, 5)


def test_statistics_follow_band_names() -> None:
    image = _raw(2)
    bands = ('B8A', 'VH', 'B02')
    picked = image[:, [BANDS.index(band) for band in bands]]
    every = Normalize(BANDS, clip=None)({'image': image})['image']
    some = Normalize(bands, clip=None)({'image': picked})['image']
    torch.testing.assert_close(some, every[:, [BANDS.index(band) for band in bands]])
    assert some[:, 1].mean().item() == pytest.approx(
        (picked[:, 1].mean().item() + 19.2) / 6.3, abs=1e-4
    )


def test_sample_and_batch_agree() -> None:
    image = _raw(3)
    normalize = Normalize(BANDS)
    batch = normalize({'image': image})
    sample = normalize({'image': image[1]})
    torch.testing.assert_close(sample['image'], batch['image'][1], rtol=0, atol=0)
    assert sample['valid'].shape == (6, 5)


def test_outliers_are_clipped() -> None:
    image = torch.full((1, 2, 1, 2), -15.0)
    image[0, 0, 0, 0] = 200.0
    assert Normalize(('VV', 'VH'))({'image': image})['image'].max() == 5.0
    assert Normalize(('VV', 'VH'), clip=None)({'image': image})['image'].max() > 40


def test_invalid_ground_is_zero() -> None:
    image = _raw(2)
    valid = torch.ones(2, 6, 5, dtype=torch.bool)
    valid[0, 2, 3] = False
    image[0, :, 2, 3] = float('nan')
    image[1, 0, 4, 4] = float('-inf')  # No power at all, in dB; declared valid all the same.
    batch = Normalize(BANDS)({'image': image, 'valid': valid})
    expected = valid.clone()
    expected[1, 4, 4] = False
    assert torch.equal(batch['valid'], expected)
    assert torch.equal((batch['image'] == 0).all(dim=1), ~expected)
    assert batch['image'].isfinite().all()
    without = Normalize(BANDS)({'image': image})
    assert torch.equal(without['valid'], expected)
    assert torch.equal(without['image'], batch['image'])


def test_input_and_other_entries_are_not_changed() -> None:
    image = _raw(2)
    valid = torch.ones(2, 6, 5, dtype=torch.bool)
    image[0, 0, 0, 0] = float('nan')
    batch = {'image': image.clone(), 'valid': valid.clone(), 'mask': torch.ones(2, 6, 5).long()}
    result = Normalize(BANDS)(batch)
    torch.testing.assert_close(batch['image'], image, equal_nan=True)
    assert batch['valid'].all()
    assert result['mask'] is batch['mask']


def test_denormalize_inverts() -> None:
    image = _raw(2)
    normalize = Normalize(BANDS, clip=None)
    back = normalize.denormalize(normalize({'image': image})['image'])
    torch.testing.assert_close(back, image, rtol=1e-5, atol=1e-2)


def test_statistics_move_to_the_image_once() -> None:
    normalize = Normalize(BANDS)
    image = torch.empty(2, len(BANDS), 4, 4, device='meta')
    normalize.denormalize(image)
    moved = normalize.mean
    assert moved.device == image.device
    normalize.denormalize(image)
    assert normalize.mean is moved


def test_integers_and_half_precision_keep_their_values() -> None:
    image = torch.full((1, 2, 3, 3), 12_000)
    expected = Normalize(('B02', 'B10'), clip=None)({'image': image.float()})['image']
    for dtype in (torch.int32, torch.float16):
        result = Normalize(('B02', 'B10'), clip=None)({'image': image.to(dtype)})
        assert result['valid'].all()
        torch.testing.assert_close(result['image'], expected, rtol=1e-3, atol=1e-3)


def test_statistics_are_not_saved() -> None:
    assert not Normalize(BANDS).state_dict()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(BandError, match=r'VV.*VH'):
        Normalize(('VV', 'VH'))({'image': torch.zeros(1, 3, 4, 4)})
    with pytest.raises(BandError, match='one number per band'):
        Normalize(('VV', 'VH'), mean=[0.0])
    with pytest.raises(ValueError, match='positive'):
        Normalize(('VV', 'VH'), std=[1.0, 0.0])
    with pytest.raises(ValueError, match='clip'):
        Normalize(('VV', 'VH'), clip=0.0)
