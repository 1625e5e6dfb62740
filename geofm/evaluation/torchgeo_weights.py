"""TorchGeo's pretrained models by the name of their weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torchgeo.models import get_model, get_model_weights, get_weight, list_models

from geofm.evaluation.weights import load_weights
from geofm.models import CheckpointError
from geofm.sensors import BANDS, BandError

#: Geometry in the transforms of weights; the size is set elsewhere.
_GEOMETRY = ('Resize', 'CenterCrop')


def is_torchgeo(name: str) -> bool:
    """Whether a name is one of TorchGeo's weights, e.g. 'ResNet50_Weights.SENTINEL2_ALL_DINO'.

    Args:
        name: The name.

    Returns:
        True if it looks like one.
    """
    return '_Weights.' in name


class TorchGeoBuilder:
    """Builds a model of TorchGeo with its weights.

    Attributes:
        bands: Names of its channels, as this project writes them.
        normalisation: What the weights want done to dB and DN.
        timm_name: Name of the architecture in timm, where it is one.
    """

    def __init__(self, name: str, weights: Path | None, model_args: Mapping[str, Any]) -> None:
        """Initialize a new TorchGeoBuilder instance.

        Args:
            name: Name of the weights.
            weights: File with them; None: as TorchGeo downloads them.
            model_args: Further arguments of the model.

        Raises:
            ValueError: If there are no such weights.
            BandError: If their bands are not those of Sentinel-1 and Sentinel-2.
        """
        try:
            self._weights = get_weight(name)
        except (KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"TorchGeo has no weights '{name}'") from error
        self.name = name
        self._file = weights
        self._args = dict(model_args)
        self._model = next(
            model for model in list_models() if type(self._weights) is _weights_class(model)
        )
        self.timm_name = self._weights.meta.get('model', self._model)
        self.bands = _bands(name, self._weights.meta.get('bands', ()))
        self.normalisation = [
            step
            for step in self._weights.transforms.children()
            if type(step).__name__ not in _GEOMETRY
        ]

    def build(self, random: bool) -> tuple[nn.Module, int | None]:
        """Build the model.

        Args:
            random: Leave the weights random.

        Returns:
            The model without its head, in evaluation mode, and the side of the images that it was
            pretrained on; None: any will do.

        Raises:
            CheckpointError: If the weights cannot be had or do not fit.
            ValueError: If it takes more than an image.
        """
        local = random or self._file is not None
        kwargs = {'in_chans': len(self.bands)} if local else {'weights': self._weights}
        try:
            model = get_model(self._model, **kwargs, num_classes=0, **self._args)
        except TypeError as error:
            raise ValueError(
                f'{self.name}: {self._model} is not built like the models of timm: {error}'
            ) from error
        except OSError as error:
            raise CheckpointError(
                f'{self.name}: cannot be downloaded ({error}); give the file as weights'
            ) from error
        if self._file is not None and not random:
            load_weights(model, self._file)
        if not hasattr(model, 'forward_intermediates'):
            raise ValueError(
                f'{self.name}: {self._model} is not a model of timm, so not of use here'
            )
        return model.eval(), _pretrained_size(model)


def _weights_class(model: str) -> Any:
    try:
        return get_model_weights(model)
    except ValueError:
        return None


def _bands(name: str, theirs: Any) -> tuple[str, ...]:
    """TorchGeo writes B1 and B8a, or red; we write B01 and B8A."""
    ours = []
    for band in theirs:
        text = str(band).upper()
        ours.append(f'B0{text[1]}' if len(text) == 2 and text[0] == 'B' else text)
    unknown = [band for band in ours if band not in BANDS]
    if unknown or not ours:
        raise BandError(f'{name}: its channels are {list(theirs)}, not bands of Sentinel-1 or -2')
    return tuple(ours)


def _pretrained_size(model: Any) -> int | None:
    embedding = getattr(model, 'patch_embed', None)
    size = getattr(embedding, 'img_size', None)
    return None if size is None else int(size[0])
