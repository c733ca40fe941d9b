"""What the pack does inside UNet calls: an ordered list of jobs, carried out by one wrapper around `apply_model`.

The jobs travel in `transformer_options`. Everything above that call, the hooks, areas, ControlNets and masks of the
conditioning, runs as in any other sampler and stays in inference mode. What others have put into a MODEL is told apart from that
by `attention_state`.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable
from uuid import UUID

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrappersMP

from ...attention_patches.attention import LastSiteReached
from .gradients import differentiable_attention, uncompiled

OWN = "pix2pix_zero"  # all keys of this pack in a MODEL begin so
KEY = "pix2pix_zero_jobs"
PREPARE = "pix2pix_zero_prepare"
OWN_SAMPLER = "pix2pix_zero_sampler"
GLIGEN_PATCHES = "middle_patch"
CACHES = ("easycache", "lazycache")  # ComfyUI's wrappers that leave UNet calls out, by their keys
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

LEFT_OUT = (
    "model: another node (EasyCache, TeaCache or the like?) leaves out UNet calls whose attention is needed. Take out that "
    "node."
)


class Job(Protocol):
    """Something done inside UNet calls. `stops`: the rest of a call is skipped once it has all it wants.

    It raises `LastSiteReached` then.
    """

    stops: bool

    def tapped(self, call: "UNetCall", transformer_options: dict) -> contextlib.AbstractContextManager[dict]:
        """While active, the job takes part in `call`. Yields the transformer options to make it with."""


@runtime_checkable
class Division(Protocol):
    """A job that has a UNet call made in parts of at most `rows` rows, each in a way of its own."""

    rows: int

    def check(self, call: "UNetCall") -> None:
        """Raise ValueError for a call that cannot be made so."""

    def run(self, part: "UNetCall") -> torch.Tensor | None:
        """The output of a part; None if it is to be made again, in at most `rows` rows, which may be fewer now."""


@dataclass
class UNetCall:
    """A call held back by the wrapper around `apply_model`, and the jobs that take part in it.

    `first`: number of the picture that its rows start with. `total`: pictures of the whole batch, None for its own.
    """

    executor: Callable
    x: torch.Tensor
    arguments: dict
    transformer_options: dict
    jobs: tuple[Job, ...] = ()
    first: int = 0
    total: int | None = None

    @property
    def model(self) -> BaseModel:
        """The host's BaseModel."""
        return self.executor.class_obj

    @property
    def uuids(self) -> list:
        """Of the conditioning entries in the batch, in order."""
        return self.transformer_options["uuids"]

    @property
    def pictures(self) -> int:
        """Rows of each entry."""
        return len(self.x) // len(self.uuids)

    def __call__(
        self, x: torch.Tensor, transformer_options: dict, convert: Callable = lambda value: value
    ) -> torch.Tensor:
        """The output of the UNet, zeros where a job ended the call. `convert`: goes over all other arguments."""
        arguments = {name: convert(value) for name, value in self.arguments.items()}
        c_concat, c_crossattn, control = (arguments.pop(name) for name in ("c_concat", "c_crossattn", "control"))
        try:
            with contextlib.ExitStack() as taps:
                for job in self.jobs:
                    transformer_options = taps.enter_context(job.tapped(self, transformer_options))
                output = self.executor(
                    x, arguments.pop("t"), c_concat, c_crossattn, control, transformer_options, **arguments
                )
        except LastSiteReached:
            return torch.zeros_like(x)
        if any(job.stops for job in self.jobs):
            raise ValueError(LEFT_OUT)
        return output

    def divided(self, rows: int) -> Iterator["UNetCall"]:
        """Calls of at most `rows` rows that make up this one: itself, or some of one entry's pictures each.

        It stays whole with patches between the blocks that may hold something for each row, as GLIGEN's boxes are.
        """
        options = self.transformer_options
        if len(self.x) <= rows or options.get("patches", {}).get(GLIGEN_PATCHES):
            yield self
            return
        for i, (uuid, branch) in enumerate(zip(self.uuids, options["cond_or_uncond"])):
            for start in range(0, self.pictures, rows):
                stop = min(start + rows, self.pictures)
                here = slice(i * self.pictures + start, i * self.pictures + stop)
                yield UNetCall(
                    self.executor,
                    self.x[here],
                    _rows(self.arguments, here, len(self.x)),
                    {
                        **options,
                        "uuids": [uuid],
                        "cond_or_uncond": [branch],
                        "sigmas": _rows(options["sigmas"], slice(start, stop), self.pictures),
                    },
                    self.jobs,
                    self.first + start,
                    self.total or self.pictures,
                )


def _rows(value, here: slice, total: int):
    """The rows of tensors that have `total` of them, through lists, tuples and dicts; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value[here] if value.ndim and len(value) == total else value
    if isinstance(value, dict):
        return {name: _rows(item, here, total) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rows(item, here, total) for item in value)
    return value


def with_jobs(model: ModelPatcher) -> ModelPatcher:
    """A clone of the MODEL whose UNet calls carry out the jobs in their transformer options."""
    model = model.clone()
    for kind, wrapper in ((WrappersMP.CALC_COND_BATCH, _prepare), (WrappersMP.APPLY_MODEL, _carry_out)):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


def for_own_sampler(model: ModelPatcher) -> ModelPatcher:
    """The same, for the samplers of this pack, which need every UNet call: without the host's caches of them."""
    model = with_jobs(model)
    for kinds in model.wrappers, model.model_options["transformer_options"].get("wrappers", {}):
        for keys in kinds.values():
            for key in CACHES:
                keys.pop(key, None)
    model.model_options["transformer_options"][OWN_SAMPLER] = True
    return model


def is_for_own_sampler(transformer_options: dict) -> bool:
    """Whether transformer options are those of a MODEL from `for_own_sampler`."""
    return OWN_SAMPLER in transformer_options


def add_job(model_options: dict, job: Job) -> dict:
    """Model options under which UNet calls carry out `job`, after the jobs that they have."""
    return _with_jobs(model_options, (*model_options["transformer_options"].get(KEY, ()), job))


def only_job(model_options: dict, job: Job) -> dict:
    """Model options under which UNet calls carry out `job` alone: calls on the source, which no edit is for."""
    options = _with_jobs(model_options, (job,))
    options["transformer_options"].pop(PREPARE, None)
    return options


def _with_jobs(model_options: dict, jobs: tuple[Job, ...]) -> dict:
    options = create_model_options_clone(model_options)
    options["transformer_options"][KEY] = jobs
    # Jobs work in one thread and on one device, while the host deals the entries of a batch out to several.
    options.pop("multigpu_clones", None)
    return options


def prepare_with(model_options: dict, prepare: Callable) -> dict:
    """Model options under which `prepare(model, conds, x, timestep, model_options)` gives those of each evaluation."""
    options = create_model_options_clone(model_options)
    options["transformer_options"][PREPARE] = prepare
    return options


def _prepare(
    executor: Callable, model: BaseModel, conds: list, x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict
):
    prepare = model_options["transformer_options"].get(PREPARE)
    if prepare is not None:
        model_options = prepare(model, conds, x_in, timestep, model_options)
    return executor(model, conds, x_in, timestep, model_options)


def _carry_out(
    executor: Callable,
    x: torch.Tensor,
    t: torch.Tensor,
    c_concat: torch.Tensor | None = None,
    c_crossattn: torch.Tensor | None = None,
    control: dict | None = None,
    transformer_options: dict = {},
    **kwargs,
):
    comfy.model_management.throw_exception_if_processing_interrupted()
    jobs = transformer_options.get(KEY, ())
    if x.device.type == "cpu" and (jobs or OWN_SAMPLER in transformer_options):
        # Faster and leaner there than the host's choice, sub-quadratic attention.
        transformer_options = differentiable_attention(transformer_options)
    if not jobs:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    arguments = {"t": t, "c_concat": c_concat, "c_crossattn": c_crossattn, "control": control, **kwargs}
    call = UNetCall(executor, x, arguments, transformer_options, jobs)
    division = next((job for job in jobs if isinstance(job, Division)), None)
    with uncompiled(executor.class_obj):
        if division is None:
            return call(x, transformer_options)
        division.check(call)
        parts, outputs = list(call.divided(division.rows)), []
        while parts:
            comfy.model_management.throw_exception_if_processing_interrupted()
            part = parts.pop(0)
            output = division.run(part)
            if output is None:  # here the tensors of its frames are gone
                comfy.model_management.soft_empty_cache()
                parts[:0] = part.divided(division.rows)
            else:
                outputs.append(output)
        return torch.cat(outputs)


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
