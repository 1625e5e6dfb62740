"""What a probe says of the test split."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predictions of a probe.

    Attributes:
        probe: Name of the probe, e.g. '5-NN'.
        features: Kind of features that it stood on; empty if there is one kind.
        scores: Of images: a score for each class (N, C). Of maps: classes int64 or values
            float32, (N, H, W).
        chosen: What was chosen on the validation split.
    """

    probe: str
    features: str
    scores: Tensor
    chosen: str = ''
