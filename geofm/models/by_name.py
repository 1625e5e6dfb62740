"""A model that others build by its name, and that takes the rest from the weights it loads."""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Self

import timm
import torch
from torch import Tensor, nn

from geofm.models.architecture import KEY, Architecture, Request, is_marker, misfits, unwrap
from geofm.models.checkpoints.files import CheckpointError
from geofm.sensors import BandError, sensor_channels

#: What a model keeps of itself when it is built anew.
_KEPT = {
    'training',
    'request',
    'adapts',
    'grad_checkpointing',
    '_told_depth',
}

#: Arguments that say how large a model's maps are, and how many channels they have.
_SHAPE = ('embed_dim', 'patch_size')


class BuiltByName(nn.Module):
    """What a model does when weights that describe their own architecture are loaded into it.

    The weights of a model within another module, a task for example, hold its architecture too,
    see :class:`geofm.models.architecture.Architecture`. A model that was built by its name is built
    anew if the weights that it is given are of another architecture of that name. It refuses
    weights of another name, of an architecture that contradicts what its caller asked for, and
    those that are not all of the backbone.

    Attributes:
        request: How the model was asked for by its name; None: it was not.
        adapts: Whether loading weights may change the architecture.
        bands: Names of the input channels; none until they are known.
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
    #: What stands before the names of its weights, where there were none when it was last loaded.
    missing_prefix: str | None = None
    _described: Architecture | None = None
    #: Number of blocks that whoever asked first was told of.
    _told_depth: int | None = None

    def remember(self, request: Request) -> None:
        """Remember how the model was asked for by its name.

        Args:
            request: The name and the arguments.
        """
        self.request = request
        self.adapts = True

    def fix_architecture(self) -> Self:
        """Let no weights change the architecture: all of it was asked for.

        Returns:
            The model.
        """
        self.adapts = False
        return self

    @property
    def architecture(self) -> Architecture | None:
        """What the weights say of the model; None if that cannot be said."""
        if self._described is not None or self.request is None:
            return self._described
        return self.request.describe(self.bands)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The weights of the model alone are those of any module: names of its own tensors.
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
        """Load weights, of this model or of another architecture of its name.

        Args:
            state_dict: Weights by name, of the backbone or of a task around one.
            strict: Whether all weights of the model must be there, and no other. Those of a
                backbone must be in any case, a head excepted: others that load TorchGeo's way look
                at nothing that is missing. What has no positions is no whole backbone, and may be
                a part of one.
            assign: As in PyTorch.

        Returns:
            The keys missing and unexpected, as in PyTorch.

        Raises:
            CheckpointError: If the weights are of another model or not all of a backbone.
            BandError: If they are of other bands.
        """
        weights = dict(state_dict)
        if self.adapts:
            self.prepare_for(weights)
            if not strict and _is_backbone(weights):
                self._check(self, _own_names(weights))
        return super().load_state_dict(weights, strict, assign)

    def prepare_for(self, state_dict: dict[str, Any], prefix: str = '') -> None:
        """Become what weights are of, or refuse them.

        Args:
            state_dict: Weights that are to be loaded; of those that start with *prefix*, what are
                not the model's own is taken out.
            prefix: What stands before the names of the model's weights.

        Raises:
            CheckpointError: If they are of another model.
            BandError: If they are of other bands.
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
        """Become a model of another architecture of the same name."""
        assert self.request is not None
        if there == self.architecture:
            return
        differing = self.request.differences(there)
        bands = self.request.bands_for(there, self.bands)
        if differing or bands != there.bands or bands != self.bands:
            shape = {key: differing[key] for key in _SHAPE if key in differing}
            if self._told_depth is not None and shape:
                raise CheckpointError(
                    f'the weights are of a model of {shape}, and a decoder was built for '
                    f"'{self.request.name}' as it is: take unet, upernet or segformer"
                )
            # Without memory first: whether the weights are what they say.
            with torch.device('meta'):
                described = self._build(there, bands)
                theirs = self._build(there, there.bands)
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
        """Take over all of another model but its hooks and how it is run."""
        for name, value in vars(other).items():
            if name not in _KEPT and 'hook' not in name:
                self.__dict__[name] = value
        self.train(self.training)

    def _check(self, model: 'BuiltByName', weights: Mapping[str, Tensor]) -> None:
        """Refuse weights that are not all of a backbone, or not of this one."""
        assert self.request is not None
        unused = _unused(model)
        own = {k: v for k, v in model.state_dict().items() if not k.startswith(unused)}
        given = {k: v for k, v in weights.items() if not k.startswith(unused)}
        if found := misfits(own, given):
            raise CheckpointError(f"the weights do not fit '{self.request.name}': {found}")


def description(architecture: Architecture, names: Collection[str]) -> dict[str, Tensor]:
    """What the weights of a backbone hold beside them, to be loaded into a model built by name.

    TorchGeo looks the first layer of the model that it built up among the weights. Where that
    model has other sensors, an empty tensor of this name is there to be found.

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
    """Name under which :func:`description` marks the first layer of a model of this name.

    Args:
        model: The model.

    Returns:
        The name; None if there is none.
    """
    if model.request is None:
        return None
    first = _first_layer(model.request.name, len(model.bands))
    return None if first is None else first[0]


@lru_cache
def _first_layer(model: str, channels: int) -> tuple[str, int] | None:
    """Name of the first weight of a model that is built by its name, and its input channels."""
    try:
        with torch.device('meta'):
            built: Any = timm.create_model(model, in_chans=channels, depth=1)
    except BandError:
        return None
    key = next(iter(built.encoder_bands))
    return f'{built.patch_embed_names[key]}.proj.weight', len(built.encoder_bands[key])


def _is_backbone(weights: Mapping[str, Tensor]) -> bool:
    """Whether weights are a backbone's; adapters and the like are loaded beside those."""
    return any(name.endswith('.pos_embed') for name in weights)


def _own_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the other names that torchgeo_checkpoint gives them."""

    def is_other(name: str) -> bool:
        own = name.removeprefix('model.')
        return own != name and (own in weights or own == KEY)

    return {name: value for name, value in weights.items() if not is_other(name)}


def _unused(model: BuiltByName) -> tuple[str, ...]:
    """Starts of the names of weights that are never used: patches of sensors not in the input."""
    if len(model.encoder_bands) == 1 or not model.bands:
        return ()
    at_hand = sensor_channels(model.bands)
    names = model.patch_embed_names
    return tuple(f'{name}.' for key, name in names.items() if key not in at_hand)


def _check_bands(model: BuiltByName, theirs: BuiltByName) -> None:
    """Refuse channels other than those that the weights are of."""
    given = sensor_channels(model.bands)
    for key, bands in model.encoder_bands.items():
        used = key in given or len(model.encoder_bands) == 1
        if used and theirs.encoder_bands[key] != bands:
            raise BandError(
                f'the weights take {list(theirs.encoder_bands[key])}, in the encoder of {key}, and '
                f'the model was asked for {list(bands)}'
            )
