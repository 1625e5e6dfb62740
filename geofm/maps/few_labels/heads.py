"""Classifiers of embeddings, fitted to a few labels and stored without executable code."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from geofm.atomic import atomic_file
from geofm.legend import Legend
from geofm.maps.make.windows import Floats

#: Methods of classification.
Method = Literal['logistic', 'knn', 'ridge']

#: Names of the arrays of a head, by method.
_ARRAYS: Mapping[str, tuple[str, ...]] = {
    'logistic': ('classes', 'mean', 'scale', 'coef', 'intercept'),
    'ridge': ('classes', 'mean', 'scale', 'coef', 'intercept'),
    'knn': ('classes', 'vectors', 'targets'),
}

#: Required metadata of a head's file.
_ABOUT = ('method', 'legend', 'weights_sha256', 'model')

#: Number of neighbours that vote.
NEIGHBORS = 5

#: Maximum number of iterations of logistic regression.
_ITERATIONS = 1_000

type Arrays = dict[str, npt.NDArray[Any]]


def estimator(method: Method, samples: int) -> Pipeline:
    """Create the scikit-learn pipeline of a method.

    Args:
        method: ``'logistic'`` and ``'ridge'`` standardise each dimension; ``'knn'`` is a vote of
            the nearest neighbours by cosine distance.
        samples: Number of labelled patches, which limits the number of neighbours.

    Returns:
        The pipeline, not fitted.
    """
    if method == 'logistic':
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS))
    if method == 'ridge':
        return make_pipeline(StandardScaler(), RidgeClassifier())
    neighbors = min(NEIGHBORS, samples)
    return make_pipeline(KNeighborsClassifier(neighbors, metric='cosine', algorithm='brute'))


@dataclass(frozen=True)
class Head:
    """A fitted classifier of embeddings.

    Attributes:
        method: Method of classification.
        arrays: Parameters: 'classes' (K,), values of the legend; for linear methods 'mean' and
            'scale' (D,), 'coef' (K, D) and 'intercept' (K,); for 'knn' the labelled 'vectors'
            (N, D) and their 'targets' (N,), which are indices into 'classes'.
        legend: The classes.
        weights_sha256: Hash of the weights of the model that made the embeddings.
        model: Name of the model's architecture.
    """

    method: Method
    arrays: Arrays
    legend: Legend
    weights_sha256: str
    model: str

    @classmethod
    def fit(
        cls,
        method: Method,
        vectors: Floats,
        values: npt.NDArray[np.uint8],
        legend: Legend,
        weights_sha256: str = '',
        model: str = '',
    ) -> Self:
        """Fit a classifier with scikit-learn.

        Args:
            method: Method of classification.
            vectors: Embeddings of labelled patches (N, D).
            values: Class of each patch (N,).
            legend: The classes.
            weights_sha256: Hash of the weights of the model that made the embeddings.
            model: Name of the model's architecture.

        Returns:
            The classifier.

        Raises:
            ValueError: If the method is unknown, or there are less than two classes.
        """
        if method not in get_args(Method):
            raise ValueError(f"method '{method}': choose from {', '.join(get_args(Method))}")
        classes, targets = np.unique(values, return_inverse=True)
        if len(classes) < 2:
            names = ', '.join(map(legend.name, classes.tolist())) or 'none'
            raise ValueError(f'labels of at least two classes are needed; found: {names}')
        arrays: Arrays = {'classes': classes.astype(np.uint8)}
        if method == 'knn':
            arrays |= {'vectors': vectors.astype(np.float32), 'targets': targets.astype(np.int64)}
            return cls(method, arrays, legend, weights_sha256, model)
        pipeline = estimator(method, len(values)).fit(vectors.astype(np.float64), targets)
        scaler, linear = pipeline[0], pipeline[-1]
        coef, intercept = np.atleast_2d(linear.coef_), np.atleast_1d(linear.intercept_)
        if len(coef) == 1:
            # With two classes, scikit-learn has one score, of the second class. The score of the
            # first is 0 for logistic regression, and the negative score for ridge regression.
            first = 0 if method == 'logistic' else -1
            coef = np.concatenate([first * coef, coef])
            intercept = np.concatenate([first * intercept, intercept])
        arrays |= {
            'mean': scaler.mean_,
            'scale': scaler.scale_,
            'coef': np.ascontiguousarray(coef),
            'intercept': np.ascontiguousarray(intercept),
        }
        return cls(method, arrays, legend, weights_sha256, model)

    @property
    def classes(self) -> npt.NDArray[np.uint8]:
        """Values of the classes in the legend (K,)."""
        return self.arrays['classes']

    @property
    def dimensions(self) -> int:
        """Number of dimensions of the embeddings."""
        return int(self.arrays['vectors' if self.method == 'knn' else 'coef'].shape[1])

    def probabilities(self, vectors: Floats) -> Floats:
        """Compute the probability of each class.

        For 'knn', probabilities are fractions of the votes. Ridge regression on targets of -1 and 1
        estimates 2 p - 1, so its scores are mapped to 0 to 1, and normalised to a sum of 1.

        Args:
            vectors: Embeddings (N, D).

        Returns:
            Probabilities (N, K).
        """
        if self.method == 'knn':
            known, targets = self.arrays['vectors'], self.arrays['targets']
            fitted = estimator('knn', len(targets)).fit(known, targets)
            return fitted.predict_proba(vectors.astype(np.float32)).astype(np.float32)
        scaled = (vectors.astype(np.float64) - self.arrays['mean']) / self.arrays['scale']
        scores = scaled @ self.arrays['coef'].T + self.arrays['intercept']
        if self.method == 'logistic':
            parts = np.exp(scores - scores.max(axis=1, keepdims=True))
        else:
            parts = ((scores + 1) / 2).clip(0, 1)
            # Breaks the tie if all scores are below -1 or several are above 1.
            parts[np.arange(len(parts)), scores.argmax(axis=1)] += 1e-6
        return (parts / parts.sum(axis=1, keepdims=True)).astype(np.float32)

    def predict(self, vectors: Floats) -> npt.NDArray[np.uint8]:
        """Return the class (N,) of embeddings (N, D): the first of the most probable ones."""
        return self.classes[self.probabilities(vectors).argmax(axis=1)]

    def check(self, path: Path, weights_sha256: str, dimensions: int) -> None:
        """Check that embeddings were made by the model that this head was fitted for.

        Args:
            path: File of the embeddings, for the message.
            weights_sha256: Hash of the weights of the model that made the embeddings.
            dimensions: Number of dimensions of the embeddings.

        Raises:
            ValueError: If they were made by another model.
        """
        if weights_sha256 != self.weights_sha256 or dimensions != self.dimensions:
            raise ValueError(
                f'{path}: embeddings of another model: weights {weights_sha256[:12]}, '
                f'{dimensions} dimensions; the head is for weights {self.weights_sha256[:12]}, '
                f'{self.dimensions} dimensions; fit a new head with --labels'
            )

    # -- in files -------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the classifier.

        Args:
            path: A ``.safetensors`` file of the arrays, described in its metadata.
        """
        about = {
            'method': self.method,
            'legend': json.dumps(self.legend.entry()),
            'weights_sha256': self.weights_sha256,
            'model': self.model,
        }
        arrays = {name: np.ascontiguousarray(values) for name, values in self.arrays.items()}
        with atomic_file(path) as part:
            part.write_bytes(save(arrays, about))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a classifier.

        Args:
            path: File written by :meth:`save`. It need not be trusted.

        Returns:
            The classifier.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it is not a classifier or is damaged.
        """
        if not path.is_file():
            raise FileNotFoundError(f'{path}: no such file (given as the head)')
        try:
            with safe_open(path, framework='numpy') as file:
                about = file.metadata() or {}
                method, legend, weights, model = (about[name] for name in _ABOUT)
                arrays = {name: file.get_tensor(name) for name in _ARRAYS[method]}
            head = cls(
                method,
                arrays,
                Legend.from_entry(json.loads(legend)),
                weights,
                model,
            )
            head._check_arrays()
        except (SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f'{path}: not a head; give a head.safetensors written by `geofm classify` ({error})'
            ) from error
        return head

    def _check_arrays(self) -> None:
        """Check that the arrays are consistent."""
        arrays, count = self.arrays, len(self.classes)
        known = np.isin(self.classes, self.legend.values).all()
        if count < 2 or len(np.unique(self.classes)) < count or not known:
            raise ValueError('its classes do not match its legend')
        if self.method == 'knn':
            targets = arrays['targets']
            wanted = {'classes': (count,), 'vectors': (len(targets), self.dimensions)}
            good = targets.ndim == 1 and len(np.unique(targets)) == count
            good = good and targets.min() >= 0 and targets.max() < count
        else:
            wanted = {
                'classes': (count,),
                'mean': (self.dimensions,),
                'scale': (self.dimensions,),
                'coef': (count, self.dimensions),
                'intercept': (count,),
            }
            good = bool((arrays['scale'] > 0).all())
        shapes = {name: arrays[name].shape for name in wanted}
        if not good or shapes != wanted or not all(np.isfinite(a).all() for a in arrays.values()):
            raise ValueError('its arrays are inconsistent')
