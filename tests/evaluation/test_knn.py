import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from geofm.evaluation import knn_accuracy, knn_predict


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 15), st.integers(1, 7), st.integers(0, 1000))
def test_one_vote_a_neighbour_equals_scikit_learn(k: int, chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(40, 8, generator=generator)
    labels = torch.randint(0, 4, (40,), generator=generator)
    queries = torch.randn(25, 8, generator=generator)
    reference = KNeighborsClassifier(k, metric='cosine', algorithm='brute')
    expected = torch.from_numpy(reference.fit(bank, labels).predict(queries))
    predicted = knn_predict(bank, labels, queries, k, temperature=None, chunk_size=chunk)
    assert torch.equal(predicted, expected)


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


def test_accuracy_is_the_share_of_right_labels() -> None:
    bank, labels = torch.eye(4), torch.arange(4)
    queries = torch.eye(4)[[0, 1, 2, 2]]
    assert knn_accuracy(bank, labels, queries, torch.tensor([0, 1, 2, 3]), k=1) == 0.75


def test_impossible_k_is_refused() -> None:
    with pytest.raises(ValueError, match='k=5 neighbours of a bank of 4'):
        knn_predict(torch.eye(4), torch.arange(4), torch.eye(4), k=5)
