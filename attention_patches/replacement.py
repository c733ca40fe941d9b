"""Stand in for the attention at some sites of a single UNet call, beside whatever other packs have patched into it.

What is installed is on the call's own transformer options, not on the model: nothing stays behind.
"""

from collections.abc import Callable, Iterable

from comfy.ldm.modules.attention import optimized_attention

from .sites import AttentionSite


def with_attention(transformer_options: dict, kind: str, sites: Iterable[AttentionSite], attend: Callable) -> dict:
    """A copy of `transformer_options` in which `attend(site, q, k, v, heads, attention)` gives the output at `sites`.

    `kind`: "attn1" for self-attention, "attn2" for cross-attention. `attention(q, k, v)`: what would have given the output
    otherwise, a replace patch of another pack or the host's own attention.
    """
    options = transformer_options.copy()
    options["patches_replace"] = options.get("patches_replace", {}).copy()
    theirs = options["patches_replace"].get(kind, {})
    ours = {site: _patch(site, theirs.get(site, theirs.get(site[:2])), attend) for site in sites}
    options["patches_replace"][kind] = theirs | ours
    return options


def _patch(site: AttentionSite, previous: Callable | None, attend: Callable) -> Callable:
    def patch(q, k, v, extra_options):
        heads = extra_options["n_heads"]

        def attention(q, k, v):
            if previous is not None:
                return previous(q, k, v, extra_options)
            precision = extra_options.get("attn_precision")
            return optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=extra_options)

        return attend(site, q, k, v, heads, attention)

    return patch
