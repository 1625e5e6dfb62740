"""Patch words, compared with an explicit computation patch by patch."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from geofm.evaluation.backbones import PatchWordsEncoder
from geofm.models.patch_words import PatchWords, spherical_kmeans

SIZE, WORDS = 4, 12


def textures(count: int, seed: int = 0) -> torch.Tensor:
    """Images (N, 3, 20, 24) of stripes of random direction and colour."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:20, :24]
    images = [
        np.sin(rng.uniform(0.3, 2) * (x * np.cos(a) + y * np.sin(a)))[None]
        * rng.normal(size=(3, 1, 1))
        for a in rng.uniform(0, np.pi, count)
    ]
    noise = rng.normal(0, 0.1, (count, 3, 20, 24))
    return torch.tensor(np.stack(images) + noise, dtype=torch.float32)


@pytest.fixture(scope='module')
def words() -> PatchWords:
    words = PatchWords(3, SIZE, WORDS)
    words.fit([{'image': textures(40)}], 40)
    return words


def test_codes_are_those_of_the_paper_patch_by_patch(words: PatchWords) -> None:
    image = textures(1, seed=1)[0]
    codes = words(image[None])[0]
    filters = words.filters.flatten(1).double()
    for row, top in enumerate(range(0, 20 - SIZE + 1, SIZE // 2)):
        for col, left in enumerate(range(0, 24 - SIZE + 1, SIZE // 2)):
            patch = image[:, top : top + SIZE, left : left + SIZE].double().flatten()
            patch = (patch - patch.mean()) / (patch.var(correction=0) + 0.01).sqrt()
            products = filters @ patch - words.offset.double()
            expected = (products - 1).clamp(min=0)
            assert torch.allclose(codes[:, row, col].double(), expected, atol=1e-4)


def test_words_are_whitened_centres(words: PatchWords) -> None:
    # Each word is the mean of the whitened patches that are nearest to it.
    points = torch.nn.functional.normalize(torch.randn(300, 5), dim=1)
    centres = spherical_kmeans(points, 4, torch.Generator().manual_seed(0), iterations=100)
    nearest = (points @ centres.T).argmax(dim=1)
    for k in range(4):
        mean = torch.nn.functional.normalize(points[nearest == k].sum(dim=0), dim=0)
        assert torch.allclose(mean, centres[k], atol=1e-5)
    # For well-separated directions, it finds the same clusters as k-means.
    axes = torch.eye(4).repeat_interleave(50, dim=0) + 0.05 * torch.randn(200, 4)
    axes = torch.nn.functional.normalize(axes, dim=1)
    best = max(
        (spherical_kmeans(axes, 4, torch.Generator().manual_seed(seed)) for seed in range(10)),
        key=lambda found: float((axes @ found.T).amax(dim=1).sum()),
    )
    labels = KMeans(4, n_init=10, random_state=0).fit_predict(axes.numpy())
    ours = (axes @ best.T).argmax(dim=1).numpy()
    assert len({(a, b) for a, b in zip(labels.tolist(), ours.tolist(), strict=True)}) == 4


def test_missing_pixels_do_not_count(words: PatchWords) -> None:
    image = textures(1, seed=2)
    valid = torch.ones(1, 20, 24, dtype=torch.bool)
    valid[:, :, 12:] = False
    encoder = PatchWordsEncoder(words)
    spoilt = image.clone()
    spoilt[..., 12:] = 7
    found = encoder.pooled({'image': spoilt, 'valid': valid})
    assert torch.allclose(found, encoder.pooled({'image': image[..., :12]}), atol=1e-5)
    assert found.shape == (1, 1, WORDS)
    nothing = encoder.pooled({'image': image, 'valid': torch.zeros_like(valid)})
    assert (nothing == 0).all()


def test_feature_maps_equal_the_features_of_cells(words: PatchWords) -> None:
    image = textures(2, seed=3)
    found = PatchWordsEncoder(words).patches({'image': image})
    assert found.shape == (2, WORDS, 5, 6)
    moved = torch.roll(image, (SIZE, SIZE), dims=(2, 3))
    again = PatchWordsEncoder(words).patches({'image': moved})
    assert torch.allclose(found[..., 1:-2, 1:-2], again[..., 2:-1, 2:-1], atol=1e-4)


def test_words_depend_only_on_images_and_seed() -> None:
    def learned(batches: list[int], seed: int) -> torch.Tensor:
        words = PatchWords(3, SIZE, WORDS)
        words.fit(({'image': part} for part in textures(40).split(batches)), 40, seed)
        return words.filters

    assert torch.equal(learned([40], 1), learned([40], 1))
    assert not torch.equal(learned([40], 1), learned([40], 2))


def test_too_few_images_are_an_error() -> None:
    with pytest.raises(ValueError, match='12 words: give more images or fewer words'):
        PatchWords(3, 8, WORDS).fit([{'image': textures(1)}], 1)
    with pytest.raises(ValueError, match='smaller than a patch of 32'):
        PatchWords(3, 32, WORDS).fit([{'image': textures(1)}], 1)
    with pytest.raises(ValueError, match='must be an even number'):
        PatchWords(3, 5, WORDS)


@pytest.mark.parametrize('side', [16, 18, 20])
def test_image_and_cells_have_the_same_codes(words: PatchWords, side: int) -> None:
    image = textures(4)[:, :, :side, :side]
    valid = torch.rand(4, side, side, generator=torch.Generator().manual_seed(1)) > 0.02
    for known in (None, valid):
        _, whole = words.on_grid(image, (2, 2), known)
        torch.testing.assert_close(whole, words.of_image(image, known))
