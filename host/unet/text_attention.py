"""The picture's attention to the text in diffusion transformers, as the jobs of guidance see it in UNets."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from ...attention_patches.attention import joined
from ...attention_patches.joint import Attention, JointSite, with_joint_attention
from ..text.conditionings import Entry
from .jobs import UNetCall
from .transformer_gradients import plain_operations

COLUMNS = "pix2pix_zero_columns"
"""In the options that a tap is called with: of each entry in the call, which keys are compared, of all pictures or of each."""


@contextlib.contextmanager
def with_text_attention(
    call: UNetCall, sites: Sequence[JointSite], entries: list[Entry], attend: Callable, transformer_options: dict
) -> Iterator[dict]:
    """While active, `attend(site, attention, q, k, v, options)` gives the output at `sites`, as `with_attention` has it.

    Its q is [B, picture's rows, heads*d], and so is what `attention(q, k, v, options)` takes in its place. `entries`: of the
    call, in its order. Yields the transformer options to make it with. Maps that are recorded are computed as those that are
    matched with them, or rounding would set the two apart.
    """

    def tapped(site: JointSite, attention: Attention, q, k, v) -> torch.Tensor:
        picture, heads = attention.picture, attention.heads

        def go_on(own_q: torch.Tensor, own_k: torch.Tensor, v: torch.Tensor, options: dict) -> torch.Tensor:
            rows = [q[:, :, : picture.start], _by_head(own_q, heads), q[:, :, picture.stop :]]
            return attention(torch.cat([part for part in rows if part.shape[2]], 2), _by_head(own_k, heads), v)

        options = {"n_heads": heads, COLUMNS: [_columns(attention, entry) for entry in entries]}
        return attend(site, go_on, joined(q[:, :, picture]), joined(k), v, options)

    with plain_operations(), with_joint_attention(call, sites, tapped, transformer_options) as options:
        yield options


def _columns(attention: Attention, entry: Entry) -> list[tuple[int, ...]]:
    """The keys of an entry's words; none of an entry that is not compared."""
    if entry.words is None:
        return [()]
    start = attention.text(entry.tokens).start
    return [tuple(start + word for word in words) for words in entry.words]


def _by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)
