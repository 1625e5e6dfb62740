"""TorchGeo's pretrained models by the name of their weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torchgeo.models import get_model, get_model_weights, get_weight, list_models

from geofm.models import CheckpointError
from geofm.models.checkpoints import read_model
from geofm.sensors import BANDS, SENTINEL1, BandError, check_bands

#: Geometry in the transforms of weights; the size is set elsewhere.
_GEOMETRY = ('Resize', 'CenterCrop')

#: Largest value of a picture.
_EIGHT_BITS = 255


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
            BandError: If they are not for bands of Sentinel-1 or Sentinel-2 in dB and DN.
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
        if _is_of_pictures(list(self._weights.transforms.children()), self.bands):
            raise BandError(f'{name}: made for pictures of 8 bits, not for reflectance')
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
        return model.eval(), _pretrained_size(self._weights)


def _weights_class(model: str) -> Any:
    try:
        return get_model_weights(model)
    except (KeyError, ValueError):
        # Some models have none.
        return None


def _bands(name: str, theirs: Any) -> tuple[str, ...]:
    """TorchGeo writes B1 and B8a; we write B01 and B8A. Landsat's B1 is another one."""
    ours = []
    for band in theirs:
        text = str(band).upper()
        ours.append(f'B0{text[1]}' if len(text) == 2 and text[0] == 'B' else text)
    if not ours or 'SENTINEL' not in name or not set(ours) <= set(BANDS):
        raise BandError(f'{name}: its channels are {list(theirs)}, not bands of Sentinel-1 or -2')
    return check_bands(ours)


def _is_of_pictures(steps: list[Any], bands: Sequence[str]) -> bool:
    """Whether the optical bands are normalised as if they had 8 bits."""
    spreads = [max(step.std) for step in steps if hasattr(step, 'std')]
    return bool(spreads) and spreads[0] <= _EIGHT_BITS and bands[0] not in SENTINEL1.band_names


def _pretrained_size(weights: Any) -> int | None:
    """Side of the images that the weights want: the crop's, or else the size they resize to."""
    sizes = {
        type(step).__name__: step.size
        for step in weights.transforms.children()
        if type(step).__name__ in _GEOMETRY
    }
    size = sizes.get('CenterCrop', sizes.get('Resize'))
    return None if size is None else int(size[0])


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of weights into a model without a head.

    Args:
        model: The model; changed in place.
        path: A ``.pth`` or ``.safetensors`` file, or a TorchGeo task's checkpoint.

    Raises:
        CheckpointError: If it cannot be read or does not fit.
    """
    heads = ('head.', 'fc.', 'classifier.')
    weights = {k: v for k, v in read_model(path).weights.items() if not k.startswith(heads)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f'{path}: its weights do not fit {type(model).__name__}: {error}'
        ) from error
