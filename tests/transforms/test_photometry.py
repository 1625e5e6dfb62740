import math
from collections.abc import Sequence

import pytest
import torch

from geofm.sensors import (
    BANDS,
    SENTINEL1,
    SENTINEL2,
    BandError,
    SensorPhotometry,
    band_statistics,
)
from geofm.transforms import Normalize, Photometry
from geofm.transforms.photometry import (
    GainAndOffset,
    ReflectanceArgs,
    Speckle,
    blur_sigma,
    speckle_decibel,
)

S1 = [BANDS.index(band) for band in SENTINEL1.band_names]
S2 = [BANDS.index(band) for band in SENTINEL2.band_names]

type Range = tuple[float, float]


def reflectance_gain(
    gain: Range = (0.8, 1.2),
    band_gain: Range = (0.95, 1.05),
    haze: Range = (0.0, 0.03),
    probability: float = 1.0,
) -> GainAndOffset:
    changes = SensorPhotometry(gain, band_gain, haze, probability=probability)
    return GainAndOffset(BANDS, {'s2': changes})


def backscatter_gain(
    gain: Range = (-1.5, 1.5),
    band_gain: Range = (-0.5, 0.5),
    probability: float = 1.0,
    bands: Sequence[str] = BANDS,
) -> GainAndOffset:
    changes = SensorPhotometry(offset=gain, band_offset=band_gain, probability=probability)
    return GainAndOffset(bands, {'s1': changes})


def _changed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return which channels of crops differ, (N, C)."""
    return (before != after).flatten(2).any(2)


def test_each_transform_only_changes_its_own_sensor() -> None:
    torch.manual_seed(0)
    gain, offset = reflectance_gain()(50)
    assert (gain[:, S1] == 1).all()
    assert (offset[:, S1] == 0).all()
    assert (gain[:, S2] != 1).all()
    gain, offset = backscatter_gain()(50)
    assert (gain == 1).all()
    assert (offset[:, S2] == 0).all()
    assert (offset[:, S1] != 0).all()
    crops = torch.randn(20, len(BANDS), 4, 4)
    changed = _changed(crops, Speckle(BANDS, 's1', probability=1.0)(crops.clone()))
    assert changed[:, S1].all()
    assert not changed[:, S2].any()


def test_probabilities() -> None:
    torch.manual_seed(0)
    n_crops = 2000
    gain, _ = reflectance_gain(probability=0.8)(n_crops)
    _, offset = backscatter_gain(probability=0.3)(n_crops)
    crops = torch.zeros(n_crops, len(BANDS), 1, 1)
    speckled = Speckle(BANDS, 's1', probability=0.5)(crops)[:, S1] != 0
    for hits, probability in (
        (gain[:, S2[0]] != 1, 0.8),
        (offset[:, S1[0]] != 0, 0.3),
        (speckled.flatten(1).any(1), 0.5),
    ):
        assert hits.float().mean() == pytest.approx(probability, abs=0.05)
    # Both polarisations of a crop have speckle, but not the same speckle.
    assert torch.equal(speckled[:, 0], speckled[:, 1])


def test_reflectance_gain_is_one_of_reflectance() -> None:
    torch.manual_seed(0)
    mean, std = band_statistics(BANDS)
    gain, offset = reflectance_gain(haze=(0.0, 0.0))(500)
    reflectance = torch.tensor(0.25)
    normalised = (reflectance * 1e4 - mean) / std
    after = ((gain * normalised + offset) * std + mean)[:, S2] / 1e4
    torch.testing.assert_close(after, (gain[:, S2] * reflectance), rtol=1e-4, atol=1e-5)
    assert after.min() >= 0.25 * 0.8 * 0.95 - 1e-4
    assert after.max() <= 0.25 * 1.2 * 1.05 + 1e-4
    # Gains of the bands of a crop are similar, but not equal.
    shared = gain[:, S2].mean(1)
    assert shared.std() > 3 * (gain[:, S2] - shared[:, None]).std() > 0


def test_haze_adds_the_same_reflectance_to_all_bands() -> None:
    _, std = band_statistics(BANDS)
    same = (1.0, 1.0)
    gain, offset = reflectance_gain(same, same, haze=(0.02, 0.02))(3)
    assert (gain == 1).all()
    torch.testing.assert_close((offset * std)[:, S2], torch.full((3, len(S2)), 200.0))


def test_effects_are_in_raw_units_whatever_the_crops_were_normalised_with() -> None:
    bands = ('B04', 'VV', 'B02')
    mean, std = torch.tensor([1001.0, -9.0, 1129.0]), torch.tensor([593.0, 3.0, 334.0])
    normalize = Normalize(bands, mean, std, clip=None)
    raw = torch.tensor([1500.0, -12.0, 900.0]).view(1, 3, 1, 1).expand(40, 3, 8, 8)
    crops = normalize({'image': raw})['image']

    def changed(gain: float, haze: float) -> torch.Tensor:
        arguments: ReflectanceArgs = {
            'gain': (gain, gain),
            'band_gain': (1.0, 1.0),
            'haze': (haze, haze),
            'probability': 1.0,
        }
        photometry = Photometry(bands, arguments)
        photometry.set_statistics(mean, std)
        torch.manual_seed(0)
        return normalize.denormalize(photometry(crops.clone()))

    hazy = changed(gain=1.0, haze=0.02) - raw
    torch.testing.assert_close(hazy[:, [0, 2]], torch.full((40, 2, 8, 8), 200.0))
    bright = changed(gain=1.1, haze=0.0) / raw
    torch.testing.assert_close(bright[:, [0, 2]], torch.full((40, 2, 8, 8), 1.1))

    backscatter = backscatter_gain((1.5, 1.5), (0.0, 0.0), bands=bands)
    speckle = Speckle(bands, 's1', (4.0, 4.0), 1.0)
    for module in (backscatter, speckle):
        module.set_statistics(mean, std)
    offset = backscatter(2)[1] * std
    torch.testing.assert_close(offset, torch.tensor([[0.0, 1.5, 0.0]]).expand(2, 3))
    noise = normalize.denormalize(speckle(torch.zeros(4, 3, 90, 90)))[:, 1] - mean[1]
    expected = 10 / math.log(10) * torch.polygamma(1, torch.tensor(4.0)).sqrt()
    torch.testing.assert_close(noise.std(), expected, rtol=0.03, atol=0)


def test_statistics_of_another_number_of_bands() -> None:
    with pytest.raises(BandError, match='one number per band'):
        Photometry(BANDS).set_statistics(torch.zeros(3), torch.ones(3))


def test_backscatter_gain_is_an_offset_in_decibel() -> None:
    torch.manual_seed(0)
    _, std = band_statistics(BANDS)
    _, offset = backscatter_gain()(2000)
    decibel = (offset * std)[:, S1]
    assert 1.8 < decibel.abs().max() <= 2.0
    ratio = decibel[:, 0] - decibel[:, 1]
    assert 0.8 < ratio.abs().max() <= 1.0
    assert decibel.mean().abs() < 0.1


@pytest.mark.parametrize('looks', [4.0, 12.5, 32.0])
def test_speckle_has_the_moments_of_gamma_noise(looks: float) -> None:
    torch.manual_seed(0)
    noise = speckle_decibel(torch.full((400_000,), looks)).double()
    power = 10 ** (noise / 10)
    assert power.mean() == pytest.approx(1, abs=0.01)
    assert power.var() == pytest.approx(1 / looks, rel=0.03)
    # ln of a gamma variate: mean digamma(L) - ln L, variance trigamma(L).
    shape = torch.tensor(looks, dtype=torch.float64)
    unit = 10 / math.log(10)
    mean = unit * (torch.digamma(shape) - shape.log())
    std = unit * torch.polygamma(1, shape).sqrt()
    assert noise.mean() == pytest.approx(mean.item(), abs=0.015)
    assert noise.std() == pytest.approx(std.item(), abs=0.025)


def test_speckle_is_in_decibel_of_each_band() -> None:
    torch.manual_seed(0)
    _, std = band_statistics(BANDS)
    crops = Speckle(BANDS, 's1', looks=(4.0, 4.0), probability=1.0)(
        torch.zeros(4, len(BANDS), 90, 90)
    )
    decibel = (crops * std.view(-1, 1, 1))[:, S1]
    expected = 10 / math.log(10) * torch.polygamma(1, torch.tensor(4.0)).sqrt()
    torch.testing.assert_close(decibel.std((0, 2, 3)), expected.expand(2), rtol=0.03, atol=0)
    vv, vh = decibel[:, 0].flatten(), decibel[:, 1].flatten()
    assert torch.corrcoef(torch.stack([vv, vh]))[0, 1].abs() < 0.05


@pytest.mark.parametrize(
    'bands',
    [SENTINEL1.band_names, SENTINEL2.band_names, ('B04', 'B03', 'B02'), ('B04', 'VH', 'B8A')],
)
def test_any_bands(bands: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    crops = torch.randn(40, len(bands), 8, 8)
    after = Photometry(bands)(crops.clone())
    assert after.isfinite().all()
    assert _changed(crops, after).any(0).all()


def test_crops_are_changed_one_by_one() -> None:
    torch.manual_seed(0)
    crops = Photometry(BANDS)(torch.ones(30, len(BANDS), 4, 4))
    for channel in (S1[0], S2[0]):
        assert len(crops[:, channel].mean((1, 2)).unique()) > 20


def test_same_seed_same_crops() -> None:
    crops = torch.randn(6, len(BANDS), 8, 8)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(Photometry(BANDS)(crops.clone()))
    assert torch.equal(*results)


def test_half_precision_is_kept() -> None:
    crops = torch.randn(6, len(BANDS), 8, 8, dtype=torch.bfloat16)
    assert Photometry(BANDS)(crops).dtype == torch.bfloat16


def test_blur_sigma_frequency_is_the_probability() -> None:
    torch.manual_seed(0)
    for probability in (0.0, 0.1, 0.5, 1.0):
        sigma = blur_sigma(torch.full((4000,), probability), (0.1, 2.0))
        drawn = sigma[sigma > 0]
        assert len(drawn) / 4000 == pytest.approx(probability, abs=0.03)
        if probability:
            assert 0.1 <= drawn.min() < 0.2
            assert 1.9 < drawn.max() <= 2.0


def test_too_few_looks() -> None:
    with pytest.raises(ValueError, match='looks'):
        Speckle(BANDS, 's1', looks=(3.0, 8.0))
