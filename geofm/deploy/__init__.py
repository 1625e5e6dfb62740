"""Export networks to files that run without geofm: ONNX, and ``torch.export`` programs."""

from geofm.deploy.deploy import Deployed, deploy

__all__ = ('Deployed', 'deploy')
