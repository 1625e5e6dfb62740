import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from geofm.evaluation import (
    knn_accuracy,
    knn_average_precision,
    knn_predict,
    knn_votes,
    whiten,
)
from geofm.evaluation.probes.knn import nearest


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 15), st.integers(0, 1000))
def test_one_vote_per_neighbour_equals_scikit_learn(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(40, 8, generator=generator)
    labels = torch.randint(0, 4, (40,), generator=generator)
    queries = torch.randn(25, 8, generator=generator)
    reference = KNeighborsClassifier(k, metric='cosine', algorithm='brute')
    expected = torch.from_numpy(reference.fit(bank, labels).predict(queries))
    assert torch.equal(knn_predict(bank, labels, queries, k, temperature=None), expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 15), st.integers(0, 1000))
def test_several_labels_equal_scikit_learn(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank, queries = (torch.randn(n, 8, generator=generator) for n in (40, 25))
    labels = torch.randint(0, 2, (40, 3), generator=generator)
    reference = KNeighborsClassifier(k, metric='cosine', algorithm='brute').fit(bank, labels)
    expected = torch.from_numpy(reference.predict(queries))
    assert torch.equal(knn_predict(bank, labels, queries, k, temperature=None), expected)
    # scikit-learn's probability of a label is the fraction of the votes.
    shares = knn_votes(bank, labels, queries, (k,), temperature=None)[k]
    for label, probabilities in enumerate(reference.predict_proba(queries)):
        if probabilities.shape[1] == 2:
            np.testing.assert_allclose(shares[:, label], probabilities[:, 1], atol=1e-6)


def on_a_grid(count: int, generator: torch.Generator) -> Tensor:
    """Features of length 1 with many exact ties, which normalisation preserves."""
    axis = torch.randint(0, 4, (count,), generator=generator)
    return torch.nn.functional.one_hot(axis, 4).float()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 29), st.integers(1, 9), st.integers(0, 1000))
def test_ties_are_broken_by_position(k: int, chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank, queries = on_a_grid(30, generator), on_a_grid(12, generator)
    similarity, neighbours = nearest(bank, queries, k, chunk)
    # Brute force: a stable sort preserves the order of the bank for ties.
    distances = -(queries.double() @ bank.double().T).numpy()
    expected = np.argsort(distances, axis=1, kind='stable')[:, :k]
    np.testing.assert_array_equal(neighbours.numpy(), expected)
    np.testing.assert_array_equal(
        -similarity.numpy(), np.take_along_axis(distances, expected, axis=1)
    )


def test_fewer_neighbours_are_the_nearest_of_more() -> None:
    bank, labels, queries = torch.randn(50, 6), torch.randint(0, 3, (50,)), torch.randn(9, 6)
    together = knn_votes(bank, labels, queries, (3, 11))
    for k in (3, 11):
        torch.testing.assert_close(together[k], knn_votes(bank, labels, queries, (k,))[k])


def test_votes_are_weighed_by_similarity() -> None:
    bank, labels = torch.randn(30, 5), torch.randint(0, 3, (30,))
    queries, k, temperature = torch.randn(10, 5), 7, 0.07
    expected = []
    for query in queries:
        similarity = torch.cosine_similarity(query[None], bank)
        votes = [0.0] * 3
        for i in similarity.argsort(descending=True)[:k].tolist():
            votes[int(labels[i])] += math.exp(similarity[i].item() / temperature)
        expected.append(votes.index(max(votes)))
    assert knn_predict(bank, labels, queries, k, temperature).tolist() == expected


def test_accuracy_is_the_fraction_of_correct_labels() -> None:
    bank, labels = torch.eye(4), torch.arange(4)
    queries = torch.eye(4)[[0, 1, 2, 2]]
    assert knn_accuracy(bank, labels, queries, torch.tensor([0, 1, 2, 3]), k=1) == 0.75


def test_an_impossible_k_is_an_error() -> None:
    with pytest.raises(ValueError, match='k=5 neighbours of a bank of 4'):
        knn_predict(torch.eye(4), torch.arange(4), torch.eye(4), k=5)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(0, 1000))
def test_whitening_equals_scikit_learn_s_pca(images: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 6, generator=generator)
    bank, queries = (torch.randn(n, 6, generator=generator) @ mixing + 3 for n in (images + 6, 9))
    reference = PCA(whiten=True).fit(bank.double().numpy())
    # Components are identified by their variance, up to sign. scikit-learn's unbiased
    # variance differs by a factor, which does not affect cosine similarity.
    spread = reference.explained_variance_**0.5
    assume(spread[-1] > 0.02 * spread[0])
    for found, features in zip(whiten(bank, queries), (bank, queries), strict=True):
        expected = reference.transform(features.double().numpy())
        angles = [cosine_similarity(torch.as_tensor(x)) for x in (found.double(), expected)]
        torch.testing.assert_close(angles[0], angles[1], atol=1e-5, rtol=0)


def cosine_similarity(x: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(x, dim=1)
    return unit @ unit.T


def test_whitening_reduces_the_weight_of_dominant_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    telling = torch.nn.functional.one_hot(labels, 3) + 0.1 * torch.randn(60, 3, generator=generator)
    loud = 100 * torch.randn(60, 2, generator=generator)
    features = torch.cat([telling, loud], dim=1)
    bank, queries, known, asked = features[:30], features[30:], labels[:30], labels[30:]
    plain = knn_accuracy(bank, known, queries, asked, k=3)
    bank, queries = whiten(bank, queries)
    assert knn_accuracy(bank, known, queries, asked, k=3) == 1 > plain


def test_noise_is_not_amplified_by_whitening() -> None:
    generator = torch.Generator().manual_seed(0)
    # The second varies a hundred thousand times less than the first; the third is constant.
    scales = torch.tensor([1.0, 1e-5, 0.0])
    bank = torch.randn(50, 3, generator=generator) * scales
    whitened, _ = whiten(bank, bank)
    spread = whitened.std(dim=0, correction=0).sort(descending=True).values
    torch.testing.assert_close(spread, torch.tensor([1.0, 1e-3, 0.0]), atol=1e-6, rtol=0.3)


def test_features_of_one_image_cannot_be_whitened() -> None:
    with pytest.raises(ValueError, match='give more training images'):
        whiten(torch.ones(1, 3), torch.ones(2, 3))


def test_multi_label_accuracy_is_an_error_and_precision_equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 8, generator=generator) for n in (40, 25))
    labels, truth = (torch.randint(0, 2, (n, 3), generator=generator) for n in (40, 25))
    with pytest.raises(ValueError, match='several labels: use knn_average_precision'):
        knn_accuracy(bank, labels, queries, truth)
    votes = knn_votes(bank, labels, queries, (5,))[5]
    expected = average_precision_score(truth.numpy(), votes.numpy(), average='micro')
    found = knn_average_precision(bank, labels, queries, truth, k=5)
    assert found == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match='use knn_accuracy'):
        knn_average_precision(bank, labels[:, 0], queries, truth[:, 0])


def test_a_negative_label_is_an_error() -> None:
    with pytest.raises(ValueError, match='the bank: label -1 is not a class'):
        knn_votes(torch.randn(3, 4), torch.tensor([0, -1, 1]), torch.randn(2, 4), (1,))
