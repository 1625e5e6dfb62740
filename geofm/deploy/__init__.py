"""Export networks to files that run without geofm: ONNX, and ``torch.export`` programs."""

from geofm.deploy.deploy import Deployed, deploy
from geofm.deploy.program import TOLERANCE

__all__ = (
    'TOLERANCE',
    'Deployed',
    'deploy',
)
