"""Plug-and-Play (Tumanyan et al., CVPR 2023) in any sampler of the host: the source is evaluated in step with the edit.

The MODEL carries wrappers only. What belongs to one sampling, the source's processed conditioning and its features at
the present noise level, lives in that sampling's own model options and goes with them.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import comfy.samplers
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider
from einops import rearrange

from ...attention_patches.attention import LastSiteReached
from ...attention_patches.joint import JointSite, united
from ...attention_patches.plug_and_play import OutputSite, Site, joint_source_sites, source_sites, tapped
from ...editing.trajectory import Inversion
from .. import running
from ..sampling.checks import check_inversion, framed, unframed
from ..sampling.source import NoiseMask, check_size, load_with_source, processed_source, start_of
from ..unet.jobs import LEFT_OUT, UNetCall, add_job, only_job, prepare_with, with_jobs
from .joint_blocks import scored_sites

KEY = "pix2pix_zero_plug_and_play"


def with_source_features(
    model: ModelPatcher, inversion: Inversion, feature_until: float, attention_until: float, negative_alpha: float = 1.0
) -> ModelPatcher:
    """A clone of the MODEL that draws with the layout of an inverted picture, in whatever sampler it is put.

    `feature_until`, `attention_until`: the part of the inversion's steps, 0..1 from the noisiest on, in which features and
    attention at the `source_sites` are the source's: of a UNet the residual features and the self-attention's q and k
    (section 4, tau_f and tau_A), of a diffusion transformer what early attention gives, and the picture's keys and values,
    these only where a noise mask lets nothing change. A sampler may visit other levels than the inversion did.
    `negative_alpha`: the paper's alpha, the share of the sampler's own negative in what cfg leads away from; the rest is the
    prediction for the source text.

    Raises ValueError if the inversion was made with another model, or where the model attends is not known.
    """
    check_inversion(inversion, model, unet=False)
    sites = sites_until(model.model.diffusion_model, inversion, feature_until, attention_until)
    model = with_jobs(model)
    lockstep = _LockstepSampling(inversion, sites, negative_alpha)
    for kind, wrapper in (
        (WrappersMP.PREPARE_SAMPLING, partial(load_with_source, inversion)),
        (WrappersMP.SAMPLER_SAMPLE, lockstep.sample),
    ):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


def sites_until(
    model: torch.nn.Module, inversion: Inversion, feature_until: float, attention_until: float
) -> dict[tuple[Site, ...], float]:
    """The sites of the source's features and of its attention, each with the noise level that it ends at."""
    features, attention = source_sites(model)
    return {
        tuple(features): inversion.lowest_sigma(feature_until),
        tuple(attention): inversion.lowest_sigma(attention_until),
    }


class _LockstepSampling:
    """The wrapper of one MODEL around a whole sampling. `sites`: with the noise level that each group ends at."""

    def __init__(self, inversion: Inversion, sites: dict[tuple[Site, ...], float], negative_alpha: float):
        self.inversion = inversion
        self.sites = sites
        self.negative_alpha = negative_alpha

    def sample(
        self,
        executor: Callable,
        guider: CFGGuider,
        sigmas: torch.Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: torch.Tensor,
        *args: Any,  # the latent to begin from, then what is only passed on
        **kwargs: Any,
    ) -> torch.Tensor:
        """Sample with the source's conditioning at hand in the model options."""
        latent_image, *passed_on = args
        self._check_shape(noise)
        start = start_of(self.inversion, sigmas, noise, latent_image)
        with processed_source(guider, self.inversion) as source:
            options = extra_args["model_options"]
            mask = NoiseMask(self.inversion.noise_mask, guider, options, sigmas)
            ends, chosen = self._sites(guider, source, options)
            features = SourceFeatures(self.inversion, source, ends, mask, chosen=chosen)
            extra_args = {**extra_args, "model_options": self._options(options, features)}
            return running.finite(executor(guider, sigmas, extra_args, callback, *start, *passed_on, **kwargs))

    def _sites(
        self, guider: CFGGuider, source: list[dict], options: dict
    ) -> tuple[dict[tuple[Site, ...], float], list[set[Site]]]:
        """(the sites, of a diffusion transformer by what the edit is, those of each picture), see `SourceFeatures`."""
        (features, until), (attention, end) = self.sites.items()
        if not isinstance(attention[-1], JointSite) or min(until, end) == math.inf:
            return self.sites, []
        dit = guider.model_patcher.model.diffusion_model
        scored = scored_sites(guider, self.inversion, source, options, least=True)
        pairs = [joint_source_sites(dit, holding) for holding in scored]
        early = united(dit, [[site.attention for site in features] for features, _ in pairs])
        ends = {tuple(map(OutputSite, early)): until, tuple(united(dit, scored)): end}
        return ends, [{*features, *attention} for features, attention in pairs]

    def _options(self, model_options: dict, features: "SourceFeatures") -> dict:
        source, mask = features.source, features.mask
        options = prepare_with(model_options, features.put_into)
        if self.negative_alpha < 1:
            blend = partial(_blend_negative, source, self.negative_alpha)
            options["sampler_pre_cfg_function"] = [*options.get("sampler_pre_cfg_function", []), blend]
        if self.inversion.noise_mask is not None:
            keep = partial(_keep_outside, self.inversion, mask)
            options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), keep]
        return options

    def _check_shape(self, noise: torch.Tensor) -> None:
        ours = self.inversion.latent(-1)
        given = unframed(noise)
        if given.shape[1:] != ours.shape[1:] or len(given) % len(ours):
            raise ValueError(
                f"latent_image: its shape is {tuple(given.shape)}, that of the inverted picture {tuple(ours.shape)}. "
                "Connect `noise` of the inversion node, as it is or repeated as a whole."
            )


def _blend_negative(source: list[dict], alpha: float, args: dict) -> list:
    """A pre-cfg function: part of the negative prediction is that for the source text (negative prompting)."""
    positive, negative, *rest = args["conds_out"]
    if args["conds"][1] is None:  # at cfg 1
        return args["conds_out"]
    (against,) = comfy.samplers.calc_cond_batch(
        args["model"], [source], args["input"], args["sigma"], args["model_options"]
    )
    return [positive, torch.lerp(against, negative, alpha), *rest]


def _keep_outside(inversion: Inversion, noise_mask: NoiseMask, args: dict) -> torch.Tensor:
    """A post-cfg function: where the inversion's noise mask is 0, euler goes down the source's own trajectory."""
    denoised, sigma = unframed(args["denoised"]), float(args["sigma"][0])
    mask = noise_mask.at(sigma, denoised)
    source = inversion.estimate_at(sigma).to(denoised)
    kept = mask * denoised + (1 - mask) * comfy.utils.repeat_to_batch_size(source, len(denoised))
    return kept.reshape(args["denoised"].shape)


class ReadFeatures:
    """Job: keep the tensors of `sites` that the UNet computes for `entries` of a conditioning.

    The rest of the UNet call is skipped; its output is zeros.
    Those of several entries are averaged with the weights that the host mixes their predictions with.
    """

    stops = True

    def __init__(self, sites: Iterable[Site], entries: list[dict], x: torch.Tensor, timestep: torch.Tensor):
        self.sites = list(sites)
        self.weights = {}
        for entry in entries:
            weighted = comfy.samplers.get_area_and_mult(entry, x, timestep)
            if weighted is not None:
                self.weights[entry["uuid"]] = unframed(weighted.mult)[:, :1]
        self._sums: dict[Site, tuple[torch.Tensor, ...]] = {}
        self._totals: dict[Site, torch.Tensor] = {}

    def tapped(self, call: UNetCall, transformer_options: dict) -> contextlib.AbstractContextManager[dict]:
        missing = set(self.sites)

        def visit(site: Site, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            for uuid, *parts in zip(call.uuids, *(tensor.chunk(len(call.uuids)) for tensor in tensors)):
                self._add(site, parts, self.weights[uuid])
            missing.discard(site)
            if not missing:
                raise LastSiteReached
            return tensors

        return tapped(call, self.sites, visit, transformer_options)

    def _add(self, site: Site, parts: list[torch.Tensor], weight: torch.Tensor) -> None:
        if len(self.weights) == 1:
            self._sums[site] = tuple(parts)
            return
        weight = _resized(weight, parts[0])
        before = self._sums.get(site, [torch.zeros_like(part) for part in parts])
        self._sums[site] = tuple(total + weight * part for total, part in zip(before, parts))
        self._totals[site] = self._totals.get(site, 0) + weight

    def features(self) -> dict[Site, tuple[torch.Tensor, ...]]:
        """What was read, by site; empty where no entry is active at this noise level.

        Raises ValueError where another pack's wrapper has answered in place of the UNet.
        """
        if self.weights and not self._sums:
            raise ValueError(LEFT_OUT)
        if not self._totals:
            return self._sums
        return {
            site: tuple(total / self._totals[site].clamp(min=1e-6) for total in totals)
            for site, totals in self._sums.items()
        }


def _resized(weight: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Weights [B, 1, H, W] for features [B, C, h, w] or, of the pixels at any fraction of the size, [B, h*w, C]."""
    if features.ndim == 4:
        return F.adaptive_avg_pool2d(weight, features.shape[2:]).to(features)
    sizes = [[math.ceil(side / 2**i) for side in weight.shape[2:]] for i in range(8)]
    size = next((size for size in sizes if math.prod(size) == features.shape[1]), None)
    if size is None:
        even = weight.mean((2, 3), keepdim=True)
        if (weight - even).abs().max() > 1e-6:
            raise ValueError(
                "model: another patch changes the size of its self-attention, so that the masks of the caption's parts do not "
                "fit there. Take it out (HyperTile, ToMe?), or invert the picture with a text without masks."
            )
        return even.squeeze(-1).repeat(len(features) // len(weight), 1, 1).to(features)
    return rearrange(F.adaptive_avg_pool2d(weight, size), "b c h w -> b (h w) c").to(features)


@dataclass
class SourceFeatures:
    """The source's features at the present noise level, put into the edit's UNet calls.

    `source`: the processed conditioning. `ends`: groups of sites with the noise level down to which they are replaced.
    `negative`: entries of another text than the source's, which get the features that this text has at the source, so that
    what is not edited is led away from the same as the source was; left out, all entries get those of the source's text.
    `mask`: where keys and values of a diffusion transformer stay the edit's own, if anywhere. `chosen`: the sites at which a
    picture's are replaced, one choice for all pictures or one for each; all of them where there is none.
    """

    inversion: Inversion
    source: list[dict]
    ends: dict[tuple[Site, ...], float]
    mask: NoiseMask | None = None
    negative: list[dict] = field(default_factory=list)
    chosen: Sequence[Collection[Site]] = ()
    _sigma: float | None = None
    _features: dict = field(default_factory=dict)  # by text and conditioning area
    _places: dict = field(default_factory=dict)  # text and area, by entry of the conditioning

    def put_into(
        self, model: BaseModel, conds: list, x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict
    ) -> dict:
        """Model options of the edit's evaluation at this noise level, see `prepare_with`.

        The source is evaluated once for all evaluations at it and each area of `conds`.
        """
        check_size(x_in, self.inversion)
        sigma = float(timestep[0])
        if sigma != self._sigma:
            self._sigma = sigma
            self._features = {}
        sites = [site for group, end in self.ends.items() if sigma >= end for site in group]
        if not sites:
            return model_options
        negative = {entry["uuid"] for entry in self.negative}
        places = {
            entry["uuid"]: (entry["uuid"] in negative, _area(entry))
            for cond in conds
            if cond is not None
            for entry in cond
        }
        self._places |= places
        x = framed(self.inversion.latent_at(sigma).to(x_in), model)
        for place in set(places.values()) - self._features.keys():
            features = read_features(model, self._entries(*place), x, sigma, sites, model_options)
            # Of q, k and v in a UNet the v stays the edit's own.
            self._features[place] = {site: tensors[:2] for site, tensors in features.items()}
        own = None if self.mask is None else self.mask.at(sigma, unframed(x_in))
        own = None if own is None else own[:, :1]
        return add_job(model_options, InjectFeatures(sites, self._features, self._places, own, self.chosen))

    def _entries(self, negative: bool, area: tuple | None) -> list[dict]:
        """The parts of a text's conditioning that speak for an area, or all if none does, each for that area."""
        text = self.negative if negative else self.source
        fitting = [entry for entry in text if _area(entry) == area]
        fitting = fitting or [entry for entry in text if _area(entry) is None] or text
        everywhere = [{name: value for name, value in entry.items() if name != "area"} for entry in fitting]
        return everywhere if area is None else [{**entry, "area": area} for entry in everywhere]


@dataclass
class InjectFeatures:
    """Job: replace the features at `sites` by the source's, in every row of the batch that `chosen` has the site for.

    `features`: by place, a text and an area of it, and site. `places`: of each entry of the conditioning. `own`: [pictures, 1,
    H, W], 1 where the keys and values of a diffusion transformer are the edit's own (KV-Edit, Zhu et al., ICCV 2025), or None.
    """

    sites: list[Site]
    features: dict
    places: dict
    own: torch.Tensor | None = None
    chosen: Sequence[Collection[Site]] = ()
    stops: ClassVar[bool] = False

    def tapped(self, call: UNetCall, transformer_options: dict) -> contextlib.AbstractContextManager[dict]:
        # An entry that another pack made up on the way is taken to speak for the whole picture.
        everywhere = (False, None)
        features = [self.features.get(self.places.get(uuid, everywhere), {}) for uuid in call.uuids]

        def visit(site: Site, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            if any(site not in part for part in features):  # the source's text has a time range, and this is outside
                return tensors
            own = tensors[: len(features[0][site])]
            sources = ([part[site][i] for part in features] for i in range(len(own)))
            taken = [_stack(parts, t, call) for parts, t in zip(sources, own)]
            if self.own is not None and isinstance(site, JointSite):
                here = _resized(_rows_of_call(self.own, len(own[0]), call), own[0])
                taken = [torch.where(here == 1, mine, torch.lerp(t, mine, here)) for t, mine in zip(taken, own)]
            rows = [self._takes(site, call.first + i) for i in range(call.pictures)] * len(features)
            if not all(rows):
                rows = torch.tensor(rows, device=own[0].device)[:, None, None]
                taken = [torch.where(rows, t, mine) for t, mine in zip(taken, own)]
            return (*taken, *tensors[len(own) :])

        return tapped(call, self.sites, visit, transformer_options)

    def _takes(self, site: Site, picture: int) -> bool:
        return not self.chosen or site in self.chosen[picture % len(self.chosen)]


def _stack(parts: list[torch.Tensor], like: torch.Tensor, call: UNetCall) -> torch.Tensor:
    """One part per conditioning entry of a call, each repeated to the pictures drawn, in place of `like`."""
    rows, total = len(like) // len(parts), call.total or call.pictures
    if any(part.shape[1:] != like.shape[1:] or total % len(part) for part in parts) or rows != call.pictures:
        raise ValueError(
            "model: another patch cuts the picture for self-attention differently in each call. "
            "Take it out, or with HyperTile set swap_size to 1."
        )
    repeated = (part.repeat(total // len(part), *(1 for _ in part.shape[1:])) for part in parts)
    return torch.cat([part[call.first : call.first + rows] for part in repeated]).to(like)


def _rows_of_call(pictures: torch.Tensor, rows: int, call: UNetCall) -> torch.Tensor:
    """Of a tensor with a row for each picture those of a call, repeated for each of its conditioning entries."""
    here = pictures[call.first : call.first + call.pictures]
    return here.repeat(rows // len(here), *(1 for _ in here.shape[1:]))


def _area(entry: dict) -> tuple | None:
    area = entry.get("area")
    return None if area is None else tuple(area)


def read_features(
    model: BaseModel, entries: list[dict], x: torch.Tensor, sigma: float, sites: Iterable[Site], model_options: dict
) -> dict[Site, tuple[torch.Tensor, ...]]:
    """What the UNet computes at `sites` for latents [B, C, H, W] at a noise level, by site, see `tapped`.

    `entries`: a processed conditioning, all of one area.
    """
    timestep = x.new_full((len(x),), sigma)
    job = ReadFeatures(sites, entries, x, timestep)
    comfy.samplers.calc_cond_batch(model, [entries], x, timestep, only_job(model_options, job))
    return job.features()
