"""Networks as files that run without geofm: ONNX, and programs of ``torch.export``."""

from geofm.deploy.deploy import Deployed, deploy

__all__ = ('Deployed', 'deploy')
