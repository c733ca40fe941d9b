"""How a node of the pack runs: what comes in is checked, then once for each picture of its lists, by ComfyUI's guider.

ComfyUI runs a node once per item of a list. That is right for a list of pictures, but a batch of B pictures captioned one
by one arrives as one latent and B texts, and these belong in one run, text i with picture i.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.samplers import CFGGuider
from comfy_api.latest import io

from ..editing.inputs import Kinds, check_inputs, look_with
from .messages import OF_SEVERAL
from .out_of_memory import is_out_of_memory, refusal
from .sampling.checks import OneFrame, framed, has_frames, unframed
from .text.conditionings import check_width, stack_conditionings, with_float_masks

NOT_FINITE = (
    "model: the sampling ended in NaN or infinite values. Load the model in bf16 or fp32, and lower cfg, guidance and the "
    "weights of patches."
)
Result = TypeVar("Result")
_turn: ContextVar[tuple[int, int]] = ContextVar("pix2pix_zero_turn", default=(0, 1))
_told: ContextVar[list[str] | None] = ContextVar("pix2pix_zero_told", default=None)


def throw_if_interrupted() -> None:
    """Raise the host's InterruptProcessingException where the user has cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


look_with(throw_if_interrupted)


def in_turn(count: int) -> Iterator[int]:
    """0 to `count` - 1: the pictures of a node's list, one after the other. Text and progress tell whose turn it is."""
    for index in range(count):
        throw_if_interrupted()
        before, mine = _turn.get(), (index, count)
        _turn.set(mine)
        try:
            yield index
        finally:
            # One that is cut off may be closed much later, by the garbage collector, in the midst of another run.
            if _turn.get() is mine:
                _turn.set(before)


@contextmanager
def listening() -> Iterator[list[str]]:
    """What `tell` and `warn` are given meanwhile, each text once: what stays on the node that is running."""
    told: list[str] = []
    before = _told.set(told)
    try:
        yield told
    finally:
        _told.reset(before)


def show(text: str) -> None:
    """Write a line on the node that is running, below what stays there. Outside a server nothing happens."""
    # Looked up rather than imported: importing it would start half a server in a script.
    host, execution = sys.modules.get("server"), sys.modules.get("comfy_execution.utils")
    server = getattr(getattr(host, "PromptServer", None), "instance", None)
    send = getattr(server, "send_progress_text", None)
    context = execution.get_executing_context() if send is not None and execution is not None else None
    if context is not None:
        told, (index, count) = _told.get() or [], _turn.get()
        if text in told:
            lines = told
        elif count > 1:
            text = OF_SEVERAL.format(number=index + 1, count=count, text=f"{text[:1].lower()}{text[1:]}")
            lines = [*told, text]
        else:
            lines = [*told, text]
        send("\n".join(lines), context.node_id)


def turn_count() -> int:
    """How many pictures the node that is running takes in turn."""
    return _turn.get()[1]


def tell(text: str) -> None:
    """Leave a line on the node that is running, which stays there when it has finished."""
    told = _told.get()
    if told is not None and text not in told:
        told.append(text)
    show(text)


def warn(text: str) -> None:
    """Leave a warning on the node that is running, and in the log."""
    logging.warning("Pix2Pix-Zero: %s", text)
    tell(text)


def over_turns(callback: Callable, further: int = 0) -> Callable:
    """A sampler's callback (step, x0, x, steps) whose progress goes on from picture to picture.

    `further`: passes of the model that a picture takes beside its steps.
    """

    def report(step: int, x0: torch.Tensor, x: torch.Tensor, steps: int) -> None:
        index, count = _turn.get()
        steps += further
        callback(index * steps + step, x0, x, count * steps)

    return report


class Lists(NamedTuple):
    """What a node that is written for one batch does with the lists that it takes, see `per_picture`."""

    pictures: str
    texts: tuple[str, ...]
    rows: tuple[str, ...]
    join: Callable[[list, str], Any]
    finish: Callable[..., None] | None


def per_picture(
    pictures: str,
    texts: tuple[str, ...],
    rows: tuple[str, ...] = (),
    join: Callable[[list, str], Any] = stack_conditionings,
    finish: Callable[..., None] | None = None,
) -> Callable[[Callable], Callable]:
    """Decorator of a node's `execute` that is written for one batch, where the node takes lists (`is_input_list`).

    `execute` is called for each item of the lists as ComfyUI would, with the texts of a batch joined; the node gives a list per
    output. `pictures`: the socket that brings the batches. `texts`: sockets with a text for each batch, for each picture
    of all batches, for a single one as many as wanted, or one for all. `rows`: sockets with MASKs or IMAGEs [B, ...], which
    go to their pictures in the same way. `join`: the texts of a batch as one. `finish`: called with the lists of all outputs.
    """

    def decorate(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
        execute.lists = Lists(pictures, texts, rows, join, finish)
        return execute

    return decorate


def entered(node: type[io.ComfyNode], kinds: Kinds) -> type[io.ComfyNode]:
    """The node, whose `execute` from now on first looks at all that comes in, runs over its lists, and leaves what it tells.

    It raises ValueError, naming the socket, for what is not of the socket's type, a number that is none or out of range, a
    text of another CLIP, and tensors that are empty or not finite. `kinds`: of the pack's own sockets.
    """
    execute = node.execute.__func__
    signature = inspect.signature(execute)
    lists: Lists | None = getattr(execute, "lists", None)
    schema: list[io.Schema] = []

    @functools.wraps(execute)
    def enter(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        if not schema:
            schema.append(node.GET_SCHEMA())  # the host's clone of the class cannot be changed
        given = _named(signature, cls, args, kwargs)
        check_entrance(schema[0], given, kinds)
        given = _with_float_masks(schema[0], given)
        try:
            with listening() as told:
                if lists is None:
                    output = execute(cls, **given)
                else:
                    results = []
                    for one in _item_by_item(given, lists):
                        results.append(execute(cls, **one).result)
                    outputs = [list(column) for column in zip(*results)]
                    if lists.finish is not None:
                        lists.finish(*outputs)
                    output = io.NodeOutput(*outputs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = refusal(error, "model" if "model" in given else next(iter(given), "memory"))
        else:
            if told:
                output.ui = {"text": told}
            return output
        raise failed  # here the tensors of the error's frames are gone

    node.execute = classmethod(enter)
    return node


def _item_by_item(given: dict[str, list], lists: Lists) -> Iterator[dict[str, Any]]:
    """The inputs of a node that is written for one batch, for each item of its lists in turn."""
    items = dict(_each_with_its_texts(given, lists))
    for index in in_turn(max(map(len, items.values()))):
        # The host repeats the last item of a shorter list.
        yield {name: values[min(index, len(values) - 1)] for name, values in items.items()}


def check_entrance(schema: io.Schema, given: dict[str, Any], kinds: Kinds) -> None:
    """Raise ValueError, naming the socket, for what a node with this schema cannot work on."""
    lists = {name: value if schema.is_input_list else [value] for name, value in given.items()}
    check_inputs(schema.inputs, lists, kinds)
    for model in lists.get("model", ()):
        for socket in (item.id for item in schema.inputs if item.get_io_type() == "CONDITIONING"):
            for conditioning in lists.get(socket, ()):
                check_width(model, conditioning, socket)


def _with_float_masks(schema: io.Schema, given: dict[str, Any]) -> dict[str, Any]:
    changed = dict(given)
    for socket in (item.id for item in schema.inputs if item.get_io_type() == "CONDITIONING"):
        if given.get(socket) is not None:
            every = given[socket] if schema.is_input_list else [given[socket]]
            every = [text if text is None else with_float_masks(text) for text in every]
            changed[socket] = every if schema.is_input_list else every[0]
    return changed


def _named(signature: inspect.Signature, cls: type, args: tuple, kwargs: dict) -> dict[str, Any]:
    return kwargs if not args else dict(list(signature.bind(cls, *args, **kwargs).arguments.items())[1:])


def _each_with_its_texts(inputs: dict[str, list], lists: Lists) -> Iterator[tuple[str, list]]:
    for name, values in inputs.items():
        if not values:
            raise ValueError(f"{name}: the list is empty. Connect at least one.")
    sizes = [_batch(item) for item in inputs[lists.pictures]]
    for name, values in inputs.items():
        if name in lists.texts:
            values = _split(values, name, sizes, lists.join)
        elif name in lists.rows:
            values = _split(_each_row(values, sizes), name, sizes, _as_batch, "batches of them")
        yield name, values


def _each_row(tensors: list, sizes: list[int]) -> list:
    """A batch [B, ...] of all pictures as one for each; other lists as they are. `sizes`: those of the pictures' batches."""
    (first, *others) = tensors
    if len(sizes) > 1 and not others and first is not None and first.ndim > 2 and len(first) == sum(sizes):
        return list(first.split(1))
    return tensors


def _as_batch(tensors: list, socket: str) -> torch.Tensor:
    if any(tensor is None or tensor.shape != tensors[0].shape for tensor in tensors):
        raise ValueError(
            f"{socket}: those of one batch must be of one size. Resize them, or give the pictures one by one."
        )
    return torch.cat([tensor if tensor.ndim > 2 else tensor[None] for tensor in tensors])


def _split(texts: list, socket: str, sizes: list[int], join: Callable, words: str = "texts") -> list:
    """One text, or one batch of masks, for each batch of `sizes` pictures, or as many as there are for a single one."""
    if len(texts) in (1, len(sizes)) or sizes == [1]:
        return texts
    if len(texts) != sum(sizes):
        raise ValueError(
            f"{socket}: it brings {len(texts)} {words} for {sum(sizes)} pictures in {len(sizes)} batches. Give one for each "
            "picture, or one for all."
        )
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [join(texts[start : start + size], socket) for start, size in zip(starts, sizes)]


def _batch(item: Any) -> int:
    """Pictures in a LATENT or an inversion."""
    return len(item["samples"]) if isinstance(item, dict) else item.batch


class Run(NamedTuple):
    """What the host hands to a sampler: the guider's evaluation, the latent [B, C, H, W], the noise levels, descending."""

    model_k: Callable
    x: torch.Tensor
    sigmas: torch.Tensor
    extra_args: dict
    callback: Callable | None

    @property
    def guider(self) -> CFGGuider:
        return self.model_k.inner_model

    @property
    def model_options(self) -> dict:
        return self.extra_args["model_options"]

    def report(self, message: str, index: int, denoised: torch.Tensor, x: torch.Tensor, **said: str) -> None:
        """Show a finished step as text, preview and progress. `message`: of `messages`, with what it says beside the step."""
        show(message.format(step=index + 1, steps=len(self.sigmas) - 1, **said))
        self.advance(index, denoised, x)

    def advance(self, index: int, denoised: torch.Tensor, x: torch.Tensor) -> None:
        """Show a finished step, or one of the further passes after all steps, as preview and progress."""
        if self.callback is not None:
            sigma, model = self.sigmas[min(index, len(self.sigmas) - 1)], self.guider.inner_model
            shown = {"denoised": framed(denoised, model), "x": framed(x, model)}
            self.callback({"i": index, **shown, "sigma": sigma, "sigma_hat": sigma})


def _run_of(model_k, x: torch.Tensor, *rest) -> Run:
    return Run(OneFrame(model_k) if has_frames(model_k.inner_model.inner_model) else model_k, unframed(x), *rest)


def sample(
    guider: CFGGuider,
    walk: Callable[[Run], tuple[torch.Tensor, Result]],
    samples: torch.Tensor,
    sigmas: torch.Tensor,
    further: int = 0,
) -> tuple[torch.Tensor, Result]:
    """Run `walk` on LATENT samples, nothing added to them, with the host's preview and progress bar.

    `walk` sees latents [B, C, H, W], of any model. Returns the samples that it ends on, and what else it returns. Raises
    ValueError if they are not finite. The seed, of what the host draws for a conditioning, such as unCLIP's noise, is the
    same for inversion and edit. `further`: passes that `walk` makes beside its steps, for the progress bar.
    """
    callback = over_turns(latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1), further)
    results = []

    def function(model_k, x, sigmas, extra_args, callback, disable):
        x, result = walk(_run_of(model_k, x, sigmas, extra_args, callback))
        x = framed(x, guider.model_patcher)
        # On its way out, the host divides what a flow ends on by the share of the picture, of which noise has none.
        results.append((result, bool(x.isfinite().all())))
        return x

    sampled = guider.sample(
        torch.zeros_like(samples),
        samples,
        comfy.samplers.KSAMPLER(function),
        sigmas,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,
    ).to(comfy.model_management.intermediate_device())
    result, is_finite = results[-1]
    if not is_finite:
        raise ValueError(NOT_FINITE)
    return sampled, result


def finite(sampled: torch.Tensor) -> torch.Tensor:
    """What a sampler ends on, as it is. Raises ValueError if it is not finite."""
    if not sampled.isfinite().all():
        raise ValueError(NOT_FINITE)
    return sampled


def look(guider: CFGGuider, read: Callable[[Run], Result], samples: torch.Tensor, sigmas: torch.Tensor) -> Result:
    """What `read` returns of a guider that is ready to evaluate, without preview and progress; nothing is drawn."""
    results = []

    def function(model_k, x, sigmas, extra_args, callback, disable):
        results.append(read(_run_of(model_k, x, sigmas, extra_args, None)))
        return x

    sampler = comfy.samplers.KSAMPLER(function)
    guider.sample(torch.zeros_like(samples), samples, sampler, sigmas, disable_pbar=True, seed=0)
    return results[-1]
