"""k-nearest-neighbour classification of features."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.functional.classification import multilabel_average_precision

from geofm.evaluation.data import class_labels

#: Maximum number of similarities in memory.
_SIMILARITIES = 2**27

#: Minimum standard deviation of a principal component for whitening, as a fraction of the largest.
#: Components that vary less are mostly noise, which whitening would amplify.
_LEAST_SPREAD = 0.01


def nearest(
    bank: Tensor, queries: Tensor, k: int, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Find the nearest neighbours by cosine similarity, from nearest to farthest.

    Equally similar neighbours are sorted by their position in the bank.

    Args:
        bank: Features of shape (N, D).
        queries: Features of shape (M, D).
        k: Number of neighbours, at most N.
        chunk_size: Number of queries per chunk. Memory grows with chunk_size x N. None: chunks of
            about half a GiB.

    Returns:
        Similarities, float32, and positions in the bank, int64, both of shape (M, k).

    Raises:
        ValueError: If *k* is not between 1 and N.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f'k={k} neighbours of a bank of {len(bank)}')
    if chunk_size is None:
        chunk_size = max(64, _SIMILARITIES // len(bank))
    bank = normalize(bank.float(), dim=1).T.contiguous()
    chunks = normalize(queries.float(), dim=1).split(chunk_size)
    found = [_nearest_of(chunk @ bank, k) for chunk in chunks if len(chunk)]
    if not found:
        return queries.new_empty(0, k, dtype=torch.float32), torch.empty(0, k, dtype=torch.long)
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)


def _nearest_of(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row; of equal values, the first."""
    if k == similarity.shape[1]:
        return _sorted(*similarity.sort(dim=1, descending=True, stable=True))
    # One more than needed: if it equals the k-th value, topk chose among equal values arbitrarily.
    values, indices = similarity.topk(k + 1, dim=1)
    tied = values[:, k] == values[:, k - 1]
    values, indices = values[:, :k], indices[:, :k]
    if tied.any():
        in_order = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied], indices[tied] = in_order.values[:, :k], in_order.indices[:, :k]
    return _sorted(values, indices)


def _sorted(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Sort rows by descending value, then by ascending position."""
    by_position = indices.sort(dim=1).indices
    values, indices = values.gather(1, by_position), indices.gather(1, by_position)
    by_value = values.sort(dim=1, descending=True, stable=True)
    return by_value.values, indices.gather(1, by_value.indices)


def whiten(bank: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Whiten features by the principal components of the bank, without labels.

    Otherwise, a few directions in which all features vary together dominate the cosine similarity.
    Jégou and Chum, 2012, *Negative evidences and co-occurrences in image retrieval: the benefit of
    PCA and whitening*.

    Args:
        bank: Features of shape (N, D), with N at least 2.
        queries: Features of shape (M, D).

    Returns:
        The centred bank and queries in components of equal variance, float32 of shapes (N, D) and
        (M, D). Components whose standard deviation is below a hundredth of the largest are divided
        by a hundredth of the largest.

    Raises:
        ValueError: If the bank has fewer than two images.
    """
    if len(bank) < 2:
        raise ValueError('features cannot be whitened with one image: give more training images')
    # In double precision, because the square root of the covariance halves the number of accurate
    # digits.
    centre = bank.double().mean(dim=0)
    variance, components = torch.linalg.eigh((bank.double() - centre).T.cov(correction=0))
    spread = variance.clamp_min(0).sqrt()
    spread = spread.clamp_min(_LEAST_SPREAD * spread.max()).clamp_min(torch.finfo().tiny)
    rotation = components / spread
    white_bank, white_queries = ((x.double() - centre) @ rotation for x in (bank, queries))
    return white_bank.float(), white_queries.float()


def knn_votes(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    ks: Sequence[int] = (5, 20),
    temperature: float | None = 0.07,
    classes: int | None = None,
) -> dict[int, Tensor]:
    """Return the fraction of the votes of the nearest neighbours for each class.

    Neighbours are found by cosine similarity. This is the protocol of DINO and DINOv2, after Wu et
    al., 2018, *Unsupervised Feature Learning via Non-Parametric Instance Discrimination*. For
    multi-label data, each label is voted on separately.

    Args:
        bank: Features with known labels, of shape (N, D).
        bank_labels: Labels of the bank: classes from 0, int64 (N,), or 0 and 1, int64 (N, C).
        queries: Features to label, of shape (M, D).
        ks: Numbers of neighbours, each at most N.
        temperature: A neighbour of similarity s has exp(s / temperature) votes. None: every
            neighbour has one vote.
        classes: Number of classes C. None: one more than the highest label.

    Returns:
        For each number of neighbours, fractions of shape (M, C), in [0, 1].

    Raises:
        ValueError: If a number of neighbours is not between 1 and N, or if a label is invalid.
    """
    bank_labels = class_labels(bank_labels, 'the bank')
    if bank_labels.ndim == 1:
        classes = int(bank_labels.max()) + 1 if classes is None else classes
        ballots = torch.nn.functional.one_hot(bank_labels, classes)
    else:
        ballots = bank_labels
    similarity, neighbours = nearest(bank, queries, max(ks))
    if temperature is None:
        weights = torch.ones_like(similarity)
    else:
        # Relative to the nearest neighbour, to prevent overflow. It cancels in the fractions.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
    return {k: _vote(ballots, neighbours[:, :k], weights[:, :k]) for k in ks}


def _vote(ballots: Tensor, neighbours: Tensor, weights: Tensor) -> Tensor:
    """Return the fraction of the votes for each class (M, C), summed neighbour by neighbour."""
    votes = torch.zeros(len(neighbours), ballots.shape[1])
    for neighbour, weight in zip(neighbours.T, weights.T, strict=True):
        votes += ballots[neighbour] * weight[:, None]
    return votes / weights.sum(dim=1, keepdim=True)


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float | None = 0.07,
) -> Tensor:
    """Label queries by a vote of their nearest neighbours, see :func:`knn_votes`.

    Args:
        bank: Features with known labels, of shape (N, D).
        bank_labels: Labels of the bank: classes from 0, int64 (N,), or 0 and 1, int64 (N, C).
        queries: Features to label, of shape (M, D).
        k: Number of neighbours, at most N.
        temperature: A neighbour of similarity s has exp(s / temperature) votes. None: every
            neighbour has one vote.

    Returns:
        Classes of the queries, int64 (M,), where the lowest of classes with equal votes wins. For
        multi-label data, int64 (M, C) with 1 for labels with more than half of the votes.

    Raises:
        ValueError: If *k* is not between 1 and N.
    """
    votes = knn_votes(bank, bank_labels, queries, (k,), temperature)[k]
    return votes.argmax(dim=1) if bank_labels.ndim == 1 else (votes > 0.5).long()


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float | None = 0.07,
) -> float:
    """Return the accuracy of :func:`knn_predict`.

    Args:
        bank: Features with known labels, of shape (N, D).
        bank_labels: Labels of the bank, int64 of shape (N,).
        queries: Features to label, of shape (M, D).
        query_labels: True labels of the queries, int64 of shape (M,).
        k: Number of neighbours.
        temperature: See :func:`knn_predict`.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: If *k* is not between 1 and N, or if labels are multi-label, which
            :func:`knn_average_precision` is for.
    """
    bank_labels = class_labels(bank_labels, 'the bank')
    query_labels = class_labels(query_labels, 'the queries')
    if bank_labels.ndim != 1 or query_labels.ndim != 1:
        raise ValueError(
            'accuracy is not defined for images with several labels: use knn_average_precision'
        )
    predictions = knn_predict(bank, bank_labels, queries, k, temperature)
    return (predictions == query_labels).float().mean().item()


def knn_average_precision(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float | None = 0.07,
) -> float:
    """Return the average precision of the votes for multi-label data.

    It is the micro average, over all pairs of image and label, as in the benchmark.

    Args:
        bank: Features with known labels, of shape (N, D).
        bank_labels: Labels of the bank, 0 and 1, int64 of shape (N, C).
        queries: Features to label, of shape (M, D).
        query_labels: True labels of the queries, 0 and 1, int64 of shape (M, C).
        k: Number of neighbours.
        temperature: See :func:`knn_votes`.

    Returns:
        Average precision in [0, 1].

    Raises:
        ValueError: If *k* is not between 1 and N, or the labels are not 0 and 1 of shape (N, C).
    """
    bank_labels = class_labels(bank_labels, 'the bank')
    query_labels = class_labels(query_labels, 'the queries')
    if bank_labels.ndim != 2 or query_labels.ndim != 2:
        raise ValueError('average precision is for images with several labels: use knn_accuracy')
    votes = knn_votes(bank, bank_labels, queries, (k,), temperature)[k]
    return multilabel_average_precision(
        votes, query_labels, query_labels.shape[1], average='micro'
    ).item()
