"""TorchGeo's pretrained models, built by the name of their weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torchgeo.models import get_model, get_model_weights, get_weight, list_models

from geofm.models import CheckpointError
from geofm.models.checkpoints import ModelFile, read_model
from geofm.sensors import BANDS, SENTINEL1, BandError, check_bands

#: Geometric transforms of weights, which the adapter replaces.
_GEOMETRY = ('Resize', 'CenterCrop')

#: Maximum value of an 8-bit image.
_EIGHT_BITS = 255


def is_torchgeo(name: str) -> bool:
    """Return whether a name has the form of TorchGeo's weights.

    Args:
        name: The name, e.g. 'ResNet50_Weights.SENTINEL2_ALL_DINO'.

    Returns:
        Whether it has this form.
    """
    return '_Weights.' in name


class TorchGeoBuilder:
    """Builder of a TorchGeo model with pretrained weights.

    Attributes:
        bands: Band names of the channels.
        normalisation: Transforms of images in dB and DN that belong to the weights.
        timm_name: Name of the architecture in timm, if it is one of timm's.
    """

    def __init__(self, name: str, weights: Path | None, model_args: Mapping[str, Any]) -> None:
        """Initialize a new TorchGeoBuilder instance.

        Args:
            name: Name of the weights.
            weights: File of the weights. None: TorchGeo downloads them.
            model_args: Further arguments of the model.

        Raises:
            ValueError: If TorchGeo has no such weights.
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
            raise BandError(f'{name}: made for 8-bit images, not for reflectance')
        self.normalisation = [
            step
            for step in self._weights.transforms.children()
            if type(step).__name__ not in _GEOMETRY
        ]

    def build(self, random: bool) -> tuple[nn.Module, int | None]:
        """Build the model.

        Args:
            random: Whether the weights are left random.

        Returns:
            The model without a head, in evaluation mode, and the side in pixels of the images that
            it was pretrained on. None: any size.

        Raises:
            CheckpointError: If the weights cannot be downloaded or read, or do not fit.
            ValueError: If the model does not have the interface of timm's models.
        """
        local = random or self._file is not None
        kwargs = {'in_chans': len(self.bands)} if local else {'weights': self._weights}
        try:
            model = get_model(self._model, **kwargs, num_classes=0, **self._args)
        except TypeError as error:
            raise ValueError(
                f'{self.name}: {self._model} cannot be built like a model of timm: {error}'
            ) from error
        except OSError as error:
            raise CheckpointError(
                f'{self.name}: cannot be downloaded ({error}); give the file as weights'
            ) from error
        if self._file is not None and not random:
            load_weights(model, self._file)
        if not hasattr(model, 'forward_intermediates'):
            raise ValueError(
                f'{self.name}: {self._model} is not a model of timm, so it cannot be evaluated'
            )
        return model.eval(), _pretrained_size(self._weights)


def _weights_class(model: str) -> Any:
    try:
        return get_model_weights(model)
    except (KeyError, ValueError):
        # Some models have no pretrained weights.
        return None


def _bands(name: str, theirs: Any) -> tuple[str, ...]:
    """Return geofm's names of bands: TorchGeo's B1 and B8a are geofm's B01 and B8A.

    Weights of other sensors are refused, because Landsat's B1 is a different band.
    """
    ours = []
    for band in theirs:
        text = str(band).upper()
        ours.append(f'B0{text[1]}' if len(text) == 2 and text[0] == 'B' else text)
    if not ours or 'SENTINEL' not in name or not set(ours) <= set(BANDS):
        raise BandError(f'{name}: its channels are {list(theirs)}, not bands of Sentinel-1 or -2')
    return check_bands(ours)


def _is_of_pictures(steps: list[Any], bands: Sequence[str]) -> bool:
    """Return whether the optical bands are normalised like 8-bit images."""
    spreads = [max(step.std) for step in steps if hasattr(step, 'std')]
    return bool(spreads) and spreads[0] <= _EIGHT_BITS and bands[0] not in SENTINEL1.band_names


def _pretrained_size(weights: Any) -> int | None:
    """Return the side of the images of the weights: of the crop, otherwise of the resized image."""
    sizes = {
        type(step).__name__: step.size
        for step in weights.transforms.children()
        if type(step).__name__ in _GEOMETRY
    }
    size = sizes.get('CenterCrop', sizes.get('Resize'))
    return None if size is None else int(size[0])


def load_weights(model: nn.Module, path: Path | ModelFile) -> None:
    """Load a file of weights into a model without a head.

    Args:
        model: The model, which is changed in place.
        path: A ``.pth`` or ``.safetensors`` file, or a checkpoint of a TorchGeo task.

    Raises:
        CheckpointError: If the file cannot be read or its weights do not fit.
    """
    heads = ('head.', 'fc.', 'classifier.')
    file = read_model(path)
    weights = {k: v for k, v in file.weights.items() if not k.startswith(heads)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f'{path}: its weights do not fit {type(model).__name__}: {error}'
        ) from error
