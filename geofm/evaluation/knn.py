"""k-nearest-neighbour classification of features."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float | None = 0.07,
    chunk_size: int = 4096,
) -> Tensor:
    """Label queries by a vote of their nearest neighbours in cosine similarity.

    Wu et al., 2018, *Unsupervised Feature Learning via Non-Parametric Instance Discrimination*;
    the protocol of DINO and DINOv2.

    Args:
        bank: Features with known labels, of shape (N, D).
        bank_labels: Their labels, int64 of shape (N,), from 0.
        queries: Features to label, of shape (M, D).
        k: Number of neighbours, at most N.
        temperature: A neighbour of similarity s has exp(s / temperature) votes; None: one.
        chunk_size: Queries at a time: memory grows with chunk_size x N.

    Returns:
        Labels of the queries, int64 of shape (M,). Of classes with equal votes, the lowest.

    Raises:
        ValueError: If *k* is not between 1 and N.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f'k={k} neighbours of a bank of {len(bank)}')
    classes = int(bank_labels.max()) + 1
    bank = normalize(bank.float(), dim=1).T.contiguous()
    predictions = []
    for chunk in normalize(queries.float(), dim=1).split(chunk_size):
        similarity, neighbours = (chunk @ bank).topk(k, dim=1)
        if temperature is None:
            votes = torch.ones_like(similarity)
        else:
            # Relative to the nearest, which cancels in the vote and cannot overflow.
            votes = ((similarity - similarity[:, :1]) / temperature).exp()
        ballots = one_hot(bank_labels[neighbours], classes) * votes[..., None]
        predictions.append(ballots.sum(dim=1).argmax(dim=1))
    return torch.cat(predictions) if predictions else bank_labels.new_empty(0)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float | None = 0.07,
) -> float:
    """Share of queries that :func:`knn_predict` labels as they are.

    Args:
        bank: Features with known labels, of shape (N, D).
        bank_labels: Their labels, int64 of shape (N,).
        queries: Features to label, of shape (M, D).
        query_labels: Their true labels, int64 of shape (M,).
        k: Number of neighbours.
        temperature: See :func:`knn_predict`.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: If *k* is not between 1 and N.
    """
    predictions = knn_predict(bank, bank_labels, queries, k, temperature)
    return (predictions == query_labels).float().mean().item()
