"""Prediction of one scene in a single call."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from geofm.maps.make.predict import ClassProduct, Prediction, PredictOptions, predict_files
from geofm.tasks.fine_tuned import FineTuned


def predict_scene(
    task: FineTuned,
    files: Mapping[str, Path],
    output: Path,
    products: Sequence[ClassProduct] = ('classes', 'picture'),
    options: PredictOptions | None = None,
) -> dict[str, Path]:
    return predict_files(Prediction.prepare(task, products, options), files, output)
