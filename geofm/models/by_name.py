"""Models that other libraries build by name, and that adapt to the weights they load."""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Self

import timm
import torch
from torch import Tensor, nn

from geofm.models.architecture import KEY, Architecture, Request, is_marker, misfits, unwrap
from geofm.models.checkpoints.files import CheckpointError
from geofm.models.shapes import shapes_only
from geofm.sensors import BandError, sensor_channels

#: Attributes that a model keeps when it is rebuilt.
_KEPT = {
    'training',
    'request',
    'adapts',
    'grad_checkpointing',
    '_reported_depth',
}

#: Arguments that determine size and channels of a model's feature maps.
_SHAPE = ('embed_dim', 'patch_size')


class BuiltByName(nn.Module):
    """Base of models that adapt to the architecture described in weights.

    The state dict of a module that contains a model, such as a task, also describes the model's
    architecture, see :class:`geofm.models.architecture.Architecture`. If weights of another
    architecture are loaded into a model that was built by name, the model is rebuilt with that
    architecture. Loading raises an error for weights of a model with another name, for an
    architecture that contradicts the arguments with which the model was built, and for incomplete
    backbones.

    Attributes:
        request: Name and arguments with which the model was built; None if not built by name.
        adapts: Whether loading weights may change the architecture.
        bands: Names of the input channels; empty until they are known.
        encoder_bands: Names of the channels of each patch embedding.
        patch_embed_names: Name of the module of each patch embedding.
        in_chans: Number of input channels.
        num_classes: Number of classes of the head.
        depth: Number of blocks.
    """

    request: Request | None = None
    adapts: bool = False
    bands: tuple[str, ...]
    encoder_bands: dict[str, tuple[str, ...]]
    patch_embed_names: dict[str, str]
    in_chans: int
    num_classes: int
    depth: int
    #: Prefix of the model's weights if none were found in the last load; otherwise None.
    missing_prefix: str | None = None
    _described: Architecture | None = None
    #: Number of blocks when ``feature_info`` was first read.
    _reported_depth: int | None = None

    def remember(self, request: Request) -> None:
        """Store how the model was built, and allow weights to change its architecture.

        Args:
            request: The name and the arguments.
        """
        self.request = request
        self.adapts = True

    def fix_architecture(self) -> Self:
        """Prevent weights from changing the architecture.

        Returns:
            The model.
        """
        self.adapts = False
        return self

    @property
    def architecture(self) -> Architecture | None:
        """Description that is stored with the weights; None if there is none."""
        if self._described is not None or self.request is None:
            return self._described
        return self.request.describe(self.bands)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The state dict of the model alone has no description, only its own tensors.
        if prefix and (architecture := self.architecture) is not None:
            names = {name.removeprefix(prefix) for name in destination if name.startswith(prefix)}
            described = description(architecture, names)
            destination.update({prefix + name: value for name, value in described.items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *args: Any
    ) -> None:
        self.prepare_for(state_dict, prefix)
        self.missing_prefix = None if any(k.startswith(prefix) for k in state_dict) else prefix
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights of this architecture, or of another one with the same model name.

        Args:
            state_dict: Weights by name, of the backbone or of a task around it.
            strict: As in PyTorch. All weights of a backbone except a head must be given in any
                case, because TorchGeo's tasks ignore missing weights. Weights without positions
                count as a part of a backbone and may be incomplete.
            assign: As in PyTorch.

        Returns:
            Missing and unexpected keys, as in PyTorch.

        Raises:
            CheckpointError: If the weights are of another model or incomplete.
            BandError: If they are for other bands.
        """
        weights = dict(state_dict)
        if self.adapts:
            self.prepare_for(weights)
            if not strict and _is_backbone(weights):
                self._check(self, _own_names(weights))
        return super().load_state_dict(weights, strict, assign)

    def prepare_for(self, state_dict: dict[str, Any], prefix: str = '') -> None:
        """Adapt the model to weights before they are loaded.

        Args:
            state_dict: Weights to load. Entries with *prefix* that are not weights, such as the
                description, are removed.
            prefix: Prefix of the names of the model's weights.

        Raises:
            CheckpointError: If the weights are of another model.
            BandError: If they are for other bands.
        """
        if not prefix and self.adapts:
            unwrap(state_dict)
        said = state_dict.pop(prefix + KEY, None)
        for name in [name for name, value in state_dict.items() if is_marker(value)]:
            if name.startswith(prefix):
                del state_dict[name]
        if not self.adapts:
            return
        weights = {
            name.removeprefix(prefix): value
            for name, value in state_dict.items()
            if name.startswith(prefix)
        }
        if not _is_backbone(weights):
            return
        weights = _own_names(weights)
        if said is not None:
            self._adapt(Architecture.from_tensor(said), weights)
        for name, value in self.state_dict().items():
            given = weights.get(name)
            if name.startswith(_unused(self)) and (given is None or given.shape != value.shape):
                state_dict[prefix + name] = value

    def _adapt(self, there: Architecture, weights: Mapping[str, Tensor]) -> None:
        """Rebuild the model with another architecture of the same name."""
        assert self.request is not None
        if there == self.architecture:
            return
        differing = self.request.differences(there)
        bands = self.request.bands_for(there, self.bands)
        if differing or bands != there.bands or bands != self.bands:
            shape = {key: differing[key] for key in _SHAPE if key in differing}
            if self._reported_depth is not None and shape:
                raise CheckpointError(
                    f'the weights are of a model with {shape}, but a decoder was already built '
                    f"for '{self.request.name}' with its defaults: use unet, upernet or segformer"
                )
            # First on the meta device, to check that the weights match their description.
            with shapes_only():
                described = self._build(there, bands)
                same = bands == there.bands
                theirs = described if same else self._build(there, there.bands)
            _check_bands(described, theirs)
            self._check(described, weights)
        if differing or bands != self.bands:
            parameter = next(self.parameters())
            with torch.device(parameter.device):
                self._become(self._build(there, bands).to(parameter.dtype))
        self._described = there

    def _build(self, architecture: Architecture, bands: Sequence[str]) -> 'BuiltByName':
        assert self.request is not None
        args = {**self.request.args, **architecture.model_args, 'num_classes': self.num_classes}
        model: Any = timm.create_model(
            self.request.name, **{**args, 'in_chans': len(bands), 'bands': list(bands)}
        )
        assert isinstance(model, BuiltByName)
        return model

    def _become(self, other: nn.Module) -> None:
        """Take over the attributes of another model, except its hooks and :data:`_KEPT`."""
        for name, value in vars(other).items():
            if name not in _KEPT and 'hook' not in name:
                self.__dict__[name] = value
        self.train(self.training)

    def _check(self, model: 'BuiltByName', weights: Mapping[str, Tensor]) -> None:
        """Check that weights are complete and fit the model."""
        assert self.request is not None
        unused = _unused(model)
        own = {k: v for k, v in model.state_dict().items() if not k.startswith(unused)}
        given = {k: v for k, v in weights.items() if not k.startswith(unused)}
        if found := misfits(own, given):
            raise CheckpointError(f"the weights do not fit '{self.request.name}': {found}")


def description(architecture: Architecture, names: Collection[str]) -> dict[str, Tensor]:
    """Return additional entries of a state dict, for loading it into a model built by name.

    These are the architecture and, if needed, a marker: TorchGeo reads from the weights the first
    layer of the model that it built. If the backbone has no layer of that name, because its sensors
    differ, an empty tensor takes its place.

    Args:
        architecture: The architecture of the backbone.
        names: Names of its weights.

    Returns:
        Tensors by name.
    """
    found = {KEY: architecture.to_tensor()}
    first = _first_layer(architecture.model, len(architecture.bands))
    if first is not None and first[0] not in names:
        found[first[0]] = torch.empty(0, first[1])
    return found


def marker_name(model: BuiltByName) -> str | None:
    """Return the name of the marker that :func:`description` writes for a model.

    Args:
        model: The model.

    Returns:
        The name; None if there is no marker.
    """
    if model.request is None:
        return None
    first = _first_layer(model.request.name, len(model.bands))
    return None if first is None else first[0]


@lru_cache
def _first_layer(model: str, channels: int) -> tuple[str, int] | None:
    """Return name and input channels of the first weight of a model that is built by name."""
    try:
        with shapes_only():
            built: Any = timm.create_model(model, in_chans=channels, depth=1)
    except BandError:
        return None
    key = next(iter(built.encoder_bands))
    return f'{built.patch_embed_names[key]}.proj.weight', len(built.encoder_bands[key])


def _is_backbone(weights: Mapping[str, Tensor]) -> bool:
    """Return whether weights are those of a backbone, and not, for example, those of adapters."""
    return any(name.endswith('.pos_embed') for name in weights)


def _own_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the second names that :func:`torchgeo_checkpoint` gives to weights."""

    def is_other(name: str) -> bool:
        own = name.removeprefix('model.')
        return own != name and (own in weights or own == KEY)

    return {name: value for name, value in weights.items() if not is_other(name)}


def _unused(model: BuiltByName) -> tuple[str, ...]:
    """Return prefixes of unused weights: patch embeddings of sensors not in the input."""
    if len(model.encoder_bands) == 1 or not model.bands:
        return ()
    at_hand = sensor_channels(model.bands)
    names = model.patch_embed_names
    return tuple(f'{name}.' for key, name in names.items() if key not in at_hand)


def _check_bands(model: BuiltByName, theirs: BuiltByName) -> None:
    """Check that the channels of a model are those of the weights."""
    given = sensor_channels(model.bands)
    for key, bands in model.encoder_bands.items():
        used = key in given or len(model.encoder_bands) == 1
        if used and theirs.encoder_bands[key] != bands:
            raise BandError(
                f'the weights take {list(theirs.encoder_bands[key])} in the encoder of {key}, but '
                f'the model was asked for {list(bands)}'
            )
