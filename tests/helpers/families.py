"""Every UNet family small: a MODEL of random weights with the blocks that ComfyUI's detection finds in the real file."""

import math
from types import SimpleNamespace

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from pix2pix_zero.benchmarks.families_parts.architectures import FAMILIES, detected, file_of
from plain_unet import attention

CHANNELS, CONTEXT, HEAD = 32, 24, 8
TOKENS = 5
HEIGHT, WIDTH = 8, 12


def small_family(name: str, context=CONTEXT, pooled=None, **changes):
    """A loaded MODEL: ComfyUI's class and settings for the family, fewer channels. To be called in inference mode.

    `context`, `pooled`: channels of the text and of its pooled vector, to go with a small text encoder. `changes`: of the
    UNet's settings.
    """
    file = file_of(FAMILIES[name])
    config = detected(file)
    heads = {} if config.unet_config["num_head_channels"] == -1 else {"num_head_channels": HEAD}
    config.unet_config |= {"model_channels": CHANNELS, "context_dim": context, **heads, **changes}
    if pooled is not None:
        config.unet_config["adm_in_channels"] += pooled - FAMILIES[name].pooled
    config.set_inference_dtype(torch.float32, None)
    known = {key: value for key, value in file.items() if not value.is_meta}
    base = config.get_model(known, device="cpu")
    draw_weights(base.diffusion_model)
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)
    comfy.model_management.load_models_gpu([model])
    return model


def few_transformers(name: str, most: int = 2) -> dict:
    """Changes for `small_family`: so many transformers where the family has more in a row, if their number does not matter."""
    settings = FAMILIES[name].settings
    few = {
        key: [min(depth, most) for depth in settings[key]] for key in ("transformer_depth", "transformer_depth_output")
    }
    few["transformer_depth_middle"] = min(settings["transformer_depth_middle"], most)
    return {key: value for key, value in few.items() if value != settings[key]}


def draw_weights(unet, seed=0) -> None:
    """Random weights with soft attention maps, under which an estimate changes slowly with the latent."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            value *= parameter[0].numel() ** -0.5 * (0.1 if name.startswith("out.") else 1.0)
        else:
            value = 0.02 * value + name.endswith("weight")
        parameter.data = value.to(parameter.dtype)


def texts(name: str, seed=0, rows=1) -> list:
    """A CONDITIONING as the family wants it: text, pooled vector, sizes of the picture, further channels."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    options = {}
    if family.pooled:
        options["pooled_output"] = torch.randn(rows, family.pooled, generator=generator)
        options |= {"width": 1024, "height": 768, "crop_w": 16, "crop_h": 8}
    if name.startswith("unclip"):
        picture = SimpleNamespace(image_embeds=torch.randn(1, 1024, generator=torch.Generator().manual_seed(7)))
        options["unclip_conditioning"] = [{"clip_vision_output": picture, "strength": 1.0, "noise_augmentation": 0.1}]
    return [[torch.randn(rows, TOKENS, CONTEXT, generator=generator), options | further_channels(name)]]


def further_channels(name: str) -> dict:
    """What ComfyUI's nodes for inpainting and pix2pix models put into the conditioning."""
    channels = FAMILIES[name].channels
    if channels is None:
        return {}
    generator = torch.Generator().manual_seed(11)
    picture = {"concat_latent_image": 4 * torch.randn(1, 4, HEIGHT, WIDTH, generator=generator)}
    if channels == "inpaint":
        picture["concat_mask"] = torch.zeros(1, HEIGHT, WIDTH)
        picture["concat_mask"][:, 2:6, 4:9] = 1.0
    return picture


def picture(model, batch=1, height=HEIGHT, width=WIDTH) -> dict:
    """A LATENT of random values in the VAE's space."""
    values = torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(3))
    return {"samples": model.model.process_latent_out(values)}


class Float64UNet:
    """The UNet of a MODEL in float64, called with what the family wants, restated here; nothing of this pack is used."""

    def __init__(self, name: str, model):
        self.name, self.model = name, model
        config = model.model.model_config
        unet = type(model.model.diffusion_model)(
            **{**config.unet_config, "dtype": torch.float64}, device="cpu", operations=comfy.ops.disable_weight_init
        )
        weights = {key: value.clone().double() for key, value in model.model.diffusion_model.state_dict().items()}
        unet.load_state_dict(weights)
        self.unet = unet.requires_grad_(False)

    def gradient(self, timestep: int, x_source, x, source: list, text: list):
        """Of the attention distance with respect to `x`, a latent of ComfyUI's scale, and the distance [B]."""
        x = x.double().requires_grad_(True)
        distance = self.distance(timestep, self.reference(timestep, x_source, source), x, text)
        return torch.autograd.grad(distance.sum(), x)[0], distance.detach()

    @torch.no_grad()
    def reference(self, timestep: int, x_source, source: list) -> list[torch.Tensor]:
        """The maps that a distance is to."""
        return self.maps(timestep, x_source.double(), source)

    def distance(self, timestep: int, reference: list[torch.Tensor], x, text: list) -> torch.Tensor:
        maps = self.maps(timestep, x, text)
        assert len(maps) == FAMILIES[self.name].sites
        return sum(((a - b) ** 2).sum((2, 3)).mean(1) for a, b in zip(maps, reference))

    def maps(self, timestep: int, x, text: list) -> list[torch.Tensor]:
        """Cross-attention maps [B, heads, pixels, tokens] in the order of the forward pass."""
        maps = []

        def attend(q, k, v, options):
            probabilities, out = attention(q, k, v, options["n_heads"])
            maps.append(probabilities)
            return out

        blocks = [("middle", 0), *((place, number) for place in ("input", "output") for number in range(12))]
        options = {
            "patches_replace": {"attn2": dict.fromkeys(blocks, attend)},
            "optimized_attention_override": lambda func, q, k, v, heads, **_: attention(q, k, v, heads)[1],
        }
        sigma = self.model.model.model_sampling.sigmas[timestep].double()
        seen = torch.cat([x / (1 + sigma**2).sqrt(), *self.concatenated(text, len(x))], 1)
        time = torch.full((len(x),), float(timestep), dtype=torch.float64)
        context = text[0][0].double().expand(len(x), -1, -1)
        self.unet(seen, time, context=context, y=self.label(text, len(x)), transformer_options=options)
        return maps

    def concatenated(self, text: list, rows: int) -> list[torch.Tensor]:
        options = text[0][1]
        if FAMILIES[self.name].channels is None:
            return []
        picture = options["concat_latent_image"].double().expand(rows, -1, -1, -1)
        if FAMILIES[self.name].channels == "picture":
            return [picture]
        scale = 0.13025 if self.name.startswith("sdxl") else 0.18215
        return [options["concat_mask"].double()[None].expand(rows, -1, -1, -1), scale * picture]

    def label(self, text: list, rows: int) -> torch.Tensor | None:
        options = text[0][1]
        if not FAMILIES[self.name].pooled:
            return None
        sizes = [options[key] for key in ("height", "width", "crop_h", "crop_w")]
        sizes += [6] if self.name == "sdxl-refiner" else [options["height"], options["width"]]
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        waves = [torch.cat([(size * frequencies).cos(), (size * frequencies).sin()]) for size in sizes]
        return torch.cat([options["pooled_output"].double().expand(rows, -1), torch.cat(waves).expand(rows, -1)], 1)
