"""Probes of image features: k-NN, linear probe and logistic regression."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from rich.progress import track
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics.functional.classification import multilabel_average_precision

from geofm.evaluation.data import Split, Task
from geofm.evaluation.features import Features, side_by_side
from geofm.evaluation.metrics import Prediction
from geofm.evaluation.probes.heads import Link, train_heads
from geofm.evaluation.probes.knn import knn_votes, whiten

type Classifier = LogisticRegression | OneVsRestClassifier | DummyClassifier

#: Learning rates of DINOv2's linear probe.
LEARNING_RATES = (
    1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1,
)  # fmt: skip

#: Batch size of the linear probe, as in DINOv2.
BATCH_SIZE = 128

#: Inverse regularisation strengths of logistic regression that are compared.
INVERSE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def knn_probe(
    splits: Mapping[Split, Features],
    kinds: Mapping[str, tuple[int, ...]],
    ks: Sequence[int],
    classes: int,
    whitened: bool = False,
) -> list[Prediction]:
    """Run k-NN on each kind of features, with the training split as the bank.

    Args:
        splits: Features of the splits.
        kinds: Indices of the vectors that are concatenated, by kind of features.
        ks: Numbers of neighbours.
        classes: Number of classes.
        whitened: Whether features are whitened, see :func:`geofm.evaluation.whiten`.

    Returns:
        A prediction for each kind of features and number of neighbours.

    Raises:
        ValueError: If a number of neighbours is not between 1 and the number of training images.
    """
    train, test = splits['train'], splits['test']
    name = '{k}-NN, whitened' if whitened else '{k}-NN'
    predictions = []
    for kind, vectors in kinds.items():
        bank, queries = (side_by_side(split.values, vectors) for split in (train, test))
        if whitened:
            bank, queries = whiten(bank, queries)
        votes = knn_votes(bank, train.targets, queries, ks, classes=classes)
        predictions += [Prediction(name.format(k=k), kind, votes[k]) for k in ks]
    return predictions


def linear_probe(
    splits: Mapping[Split, Features],
    kinds: Mapping[str, tuple[int, ...]],
    inputs: Mapping[str, tuple[int, ...]],
    task: Task,
    classes: int,
    steps: int,
    seed: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    progress: bool = True,
) -> Prediction:
    """Run DINOv2's linear probe: one head per learning rate and choice of tokens.

    Args:
        splits: Features of the splits.
        kinds: Indices of the vectors that are concatenated, by kind of features.
        inputs: Indices of the vectors that are concatenated, by choice of tokens.
        task: 'classification' or 'multilabel'.
        classes: Number of classes.
        steps: Number of steps.
        seed: Seed of the batches.
        learning_rates: Learning rates for a batch size of 256.
        progress: Whether to show a progress bar.

    Returns:
        The prediction of the head that is best on the validation split.
    """
    train, val, test = splits['train'], splits['val'], splits['test']
    _, vectors, width = train.values.shape
    chosen = [(name, rate) for name in inputs for rate in learning_rates]
    looks_at = torch.zeros(vectors, len(chosen), dtype=torch.bool)
    for head, (name, _) in enumerate(chosen):
        looks_at[list(inputs[name]), head] = True
    link: Link = 'sigmoid' if task == 'multilabel' else 'softmax'
    heads = train_heads(
        train.values.flatten(1),
        _as_fractions(train.targets, classes),
        looks_at.repeat_interleave(width, dim=0),
        [rate for _, rate in chosen],
        link,
        steps,
        BATCH_SIZE,
        torch.Generator().manual_seed(seed),
        description='linear probe' if progress else None,
    )
    values = val.values.flatten(1)
    quality = [_quality(heads.outputs(values, h), val.targets, task) for h in range(len(chosen))]
    best = int(np.argmax(quality))
    outputs = heads.outputs(test.values.flatten(1), best)
    scores = outputs.sigmoid() if link == 'sigmoid' else outputs.softmax(dim=1)
    name, rate = chosen[best]
    kind = next(iter(kinds)) if len(inputs) == 1 else 'chosen tokens'
    return Prediction('linear', kind, scores, f'{name}, learning rate {rate:g}')


def logistic_probe(
    splits: Mapping[Split, Features],
    kinds: Mapping[str, tuple[int, ...]],
    task: Task,
    classes: int,
    progress: bool = True,
) -> list[Prediction]:
    """Run scikit-learn's logistic regression.

    The regularisation is chosen on the validation split.

    Args:
        splits: Features of the splits.
        kinds: Indices of the vectors that are concatenated, by kind of features.
        task: 'classification' or 'multilabel'.
        classes: Number of classes.
        progress: Whether to show a progress bar.

    Returns:
        A prediction for each kind of features.
    """
    predictions = []
    for kind, vectors in kinds.items():
        train, val, test = (
            _standardised(splits, split, vectors) for split in ('train', 'val', 'test')
        )
        best, best_quality, scores = INVERSE_STRENGTHS[0], -1.0, torch.empty(0)
        for strength in track(
            INVERSE_STRENGTHS,
            f'logistic regression: {kind}'.removesuffix(': '),
            disable=not progress,
        ):
            model = _fit(train, splits['train'].targets.numpy(), strength, task)
            found = _probabilities(model, val, classes)
            quality = _quality(found, splits['val'].targets, task)
            if quality > best_quality:
                best, best_quality = strength, quality
                scores = _probabilities(model, test, classes)
        predictions.append(Prediction('logistic', kind, scores, f'C = {best:g}'))
    return predictions


def _standardised(
    splits: Mapping[Split, Features], split: Split, vectors: tuple[int, ...]
) -> np.typing.NDArray[np.float32]:
    train = side_by_side(splits['train'].values, vectors)
    scale = train.std(dim=0, correction=0).clamp_min(1e-6)
    found = side_by_side(splits[split].values, vectors)
    return ((found - train.mean(dim=0)) / scale).numpy()


def _fit(
    features: np.typing.NDArray[np.float32],
    targets: np.typing.NDArray[np.int64],
    strength: float,
    task: Task,
) -> Classifier:
    if targets.ndim == 1 and (targets == targets[0]).all():
        # Logistic regression needs at least two classes.
        return DummyClassifier(strategy='prior').fit(features, targets)
    model = LogisticRegression(C=strength, max_iter=500)
    if task == 'multilabel':
        model = OneVsRestClassifier(model)
    with warnings.catch_warnings():
        # Weakly regularised models may not converge. They are compared on the validation split
        # regardless.
        warnings.simplefilter('ignore', ConvergenceWarning)
        # A label that all images have, or none, becomes a constant prediction.
        warnings.filterwarnings('ignore', 'Label .* is present in')
        return model.fit(features, targets)


def _probabilities(
    model: Classifier,
    features: np.typing.NDArray[np.float32],
    classes: int,
) -> Tensor:
    """Return the probability of each class; 0 for classes without a training image."""
    found = torch.from_numpy(np.asarray(model.predict_proba(features), dtype=np.float32))
    if isinstance(model, OneVsRestClassifier):
        return found
    scores = torch.zeros(len(features), classes)
    scores[:, torch.from_numpy(model.classes_)] = found
    return scores


def _as_fractions(targets: Tensor, classes: int) -> Tensor:
    return (one_hot(targets, classes) if targets.ndim == 1 else targets).float()


def _quality(outputs: Tensor, targets: Tensor, task: Task) -> float:
    """Return the metric by which the best head is chosen; -1 if outputs are not finite."""
    if not outputs.isfinite().all():
        return -1.0
    if task == 'classification':
        return (outputs.argmax(dim=1) == targets).double().mean().item()
    # Average precision depends on ranks only, so outputs need not be probabilities.
    scores = outputs if outputs.min() >= 0 and outputs.max() <= 1 else outputs.sigmoid()
    return multilabel_average_precision(scores, targets, targets.shape[1], average='micro').item()
