"""What decides the maps that a MODEL draws: everything by which the host lets it be changed."""

import weakref
from uuid import UUID

from comfy.model_patcher import ModelPatcher

from .jobs import CACHES

OWN = "pix2pix_zero"
# What ModelPatcher keeps of changes to a model's weights, objects and calls.
PATCHER = (
    "patches_uuid",
    "object_patches",
    "weight_wrapper_patches",
    "hook_patches",
    "injections",
)
# By kind, and by key, so that this pack's own can be left out.
KEYED = ("wrappers", "callbacks")
# Options that mix estimates and never reach the UNet.
MIXING = ("sampler_", "denoise_mask_function", "disable_cfg1_optimization")


def attention_state(model: ModelPatcher) -> tuple:
    """Equal for clones that are changed alike. It keeps nothing of what others have put into the MODEL alive.

    This pack's own changes do not count, nor what its samplers leave out.
    """
    options = {name: value for name, value in model.model_options.items() if not name.startswith(MIXING)}
    inside = dict(options.pop("transformer_options", {}))
    keyed = [getattr(model, name, {}) for name in KEYED] + [inside.pop(name, {}) for name in KEYED]
    return (
        *(_state(getattr(model, name, None)) for name in PATCHER),
        *_cloned(model),
        *(_state({kind: _foreign(by_key) for kind, by_key in group.items()}) for group in keyed),
        _state(options),
        _state(_foreign(inside)),
    )


def _cloned(model: ModelPatcher) -> tuple:
    """The state of what each clone of a MODEL has a clone of."""
    hooks = getattr(model, "forced_hooks", None)
    beside = getattr(model, "additional_models", {})
    return (
        None if hooks is None else _state([hook.hook_ref for hook in hooks.hooks]),
        _state({key: [(other.model, other.patches_uuid) for other in others] for key, others in beside.items()}),
        tuple(sorted(map(str, getattr(model, "attachments", {})))),
    )


def _foreign(by_key: dict) -> dict:
    return {key: value for key, value in by_key.items() if not str(key).startswith(OWN) and key not in CACHES}


def _state(value: object) -> object:
    """Plain values and containers of them as they are, empty ones as None; any other object by its identity."""
    if isinstance(value, dict):
        items = {_state(key): _state(item) for key, item in value.items()}
        return frozenset((key, item) for key, item in items.items() if item is not None) or None
    if isinstance(value, (list, tuple)):
        return tuple(map(_state, value)) or None
    if value is None or isinstance(value, (str, bytes, int, float, UUID)):
        return value
    return _Identity(value)


class _Identity:
    """Equal to that of the same object as long as it lives, without keeping it alive."""

    def __init__(self, value: object):
        self._hash = id(value)
        try:
            self._reference = weakref.ref(value)
        except TypeError:  # of a kind that nothing can refer to weakly, which no closure is
            self._reference = lambda: value

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Identity):
            return NotImplemented
        mine = self._reference()
        return self is other or mine is not None and mine is other._reference()
