"""The UNet families that ComfyUI loads, as their authors published them, and what ComfyUI makes of such a file.

Each is written down once as UNetModel's arguments. A UNet of that shape on the meta device gives the names and shapes of
the file, from which ComfyUI's own detection tells which model it is.
"""

from dataclasses import dataclass, field

import comfy.model_detection
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

COMMON = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    use_spatial_transformer=True,
    legacy=False,
    use_temporal_attention=False,
    use_temporal_resblock=False,
    num_heads=-1,
    num_head_channels=64,
)
SD = dict(
    model_channels=320,
    channel_mult=[1, 2, 4, 4],
    num_res_blocks=[2, 2, 2, 2],
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_middle=1,
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
)
SD1 = dict(
    SD, context_dim=768, use_linear_in_transformer=False, num_heads=8, num_head_channels=-1, adm_in_channels=None
)
SD2 = dict(SD, context_dim=1024, use_linear_in_transformer=True, adm_in_channels=None)
SDXL = dict(
    model_channels=320,
    channel_mult=[1, 2, 4],
    num_res_blocks=[2, 2, 2],
    transformer_depth=[0, 0, 2, 2, 10, 10],
    transformer_depth_middle=10,
    transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
    context_dim=2048,
    use_linear_in_transformer=True,
    num_classes="sequential",
    adm_in_channels=2816,
)
KOALA = dict(
    SDXL,
    num_res_blocks=[1, 1, 1],
    transformer_depth=[0, 2, 5],
    transformer_depth_middle=-2,
    transformer_depth_output=[0, 0, 2, 2, 5, 5],
)
SDXS = dict(
    SD,
    channel_mult=[1, 2, 4],
    num_res_blocks=[1, 1, 1],
    transformer_depth=[0, 1, 1],
    transformer_depth_middle=-2,
    transformer_depth_output=[0, 0, 1, 1, 1, 1],
    context_dim=768,
    use_linear_in_transformer=False,
    num_heads=8,
    num_head_channels=-1,
    adm_in_channels=None,
)


@dataclass(frozen=True)
class Family:
    """A UNet family. `settings`: of UNetModel. `loads_as`: the name of ComfyUI's class for it.

    `sites`: its cross-attentions. `resolution`: pixels a side that it was trained on. `prediction`: "eps" or "v".
    `entries`: what its files hold beside the UNet's weights, {name: tensor}. `channels`: what the input has beside the
    latent: "inpaint" (mask and masked picture), "picture", or None. `layout`: of the names in its files.
    """

    settings: dict
    loads_as: str
    sites: int
    resolution: int = 1024
    prediction: str = "eps"
    channels: str | None = None
    entries: dict = field(default_factory=dict)
    layout: str = "ldm"

    @property
    def pooled(self) -> int:
        """Channels of the text's pooled vector that the UNet takes, 0 if it takes none."""
        sizes = {2816: 6, 2560: 5}.get(self.settings["adm_in_channels"])
        return 0 if sizes is None else self.settings["adm_in_channels"] - sizes * 256


SD2_SHIFTED_NORM = "output_blocks.11.1.transformer_blocks.0.norm1.bias"

FAMILIES = {
    "sd15": Family(SD1, "SD15", 16, 512),
    "sd20": Family(SD2, "SD20", 16, 512),
    "sd21-v": Family(SD2, "SD20", 16, 768, "v"),
    "sdxl": Family(SDXL, "SDXL", 70),
    "sdxl-v": Family(SDXL, "SDXL", 70, prediction="v", entries={"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}),
    "sdxl-refiner": Family(
        dict(
            SDXL,
            model_channels=384,
            channel_mult=[1, 2, 4, 4],
            num_res_blocks=[2, 2, 2, 2],
            transformer_depth=[0, 0, 4, 4, 4, 4, 0, 0],
            transformer_depth_middle=4,
            transformer_depth_output=[0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
            context_dim=1280,
            adm_in_channels=2560,
        ),
        "SDXLRefiner",
        44,
    ),
    "ssd-1b": Family(
        dict(
            SDXL,
            transformer_depth=[0, 0, 2, 2, 4, 4],
            transformer_depth_middle=-1,
            transformer_depth_output=[0, 0, 0, 1, 1, 2, 10, 4, 4],
        ),
        "SSD1B",
        34,
    ),
    "vega": Family(
        dict(
            SDXL,
            transformer_depth=[0, 0, 1, 1, 2, 2],
            transformer_depth_middle=-1,
            transformer_depth_output=[0, 0, 0, 1, 1, 1, 2, 2, 2],
        ),
        "Segmind_Vega",
        15,
    ),
    "koala-700m": Family(KOALA, "KOALA_700M", 21),
    "koala-1b": Family(
        dict(
            KOALA,
            transformer_depth=[0, 2, 6],
            transformer_depth_middle=6,
            transformer_depth_output=[0, 0, 2, 2, 6, 6],
        ),
        "KOALA_1B",
        30,
    ),
    "sdxs": Family(SDXS, "SD15", 6, 512),
    # It attends to the text twice at the top; ComfyUI knows it in diffusers' layout only.
    "sdxs-09": Family(
        dict(
            SDXS,
            transformer_depth=[1, 1, 1],
            transformer_depth_output=[1, 1, 1, 1, 1, 1],
            context_dim=1024,
            use_linear_in_transformer=True,
            num_heads=-1,
            num_head_channels=64,
            disable_self_attentions=[True, False, False],
        ),
        "SD20",
        9,
        512,
        layout="diffusers",
    ),
    "sd15-inpaint": Family(dict(SD1, in_channels=9), "SD15", 16, 512, channels="inpaint"),
    "sd20-inpaint": Family(dict(SD2, in_channels=9), "SD20", 16, 512, channels="inpaint"),
    "sdxl-inpaint": Family(dict(SDXL, in_channels=9), "SDXL", 70, channels="inpaint"),
    "sd15-pix2pix": Family(dict(SD1, in_channels=8), "SD15_instructpix2pix", 16, 512, channels="picture"),
    "sdxl-pix2pix": Family(dict(SDXL, in_channels=8), "SDXL_instructpix2pix", 70, channels="picture"),
    "unclip-h": Family(
        dict(SD2, num_classes="sequential", adm_in_channels=2048), "SD21UnclipH", 16, 768, prediction="v"
    ),
}


def file_of(family: Family) -> dict[str, torch.Tensor]:
    """{name: tensor} of a file of this family, as the loaders see it; the weights are on the meta device."""
    unet = UNetModel(**COMMON | family.settings, device="meta", operations=comfy.ops.disable_weight_init)
    weights = dict(unet.state_dict())
    if SD2_SHIFTED_NORM in weights:
        # By the spread of this bias ComfyUI tells SD 2.x models that predict v from those that predict eps.
        spread = 0.2 if family.prediction == "v" else 0.02
        weights[SD2_SHIFTED_NORM] = spread * torch.linspace(-1, 1, len(weights[SD2_SHIFTED_NORM]))
    if family.layout == "diffusers":
        names = comfy.utils.unet_to_diffusers(COMMON | family.settings)
        weights = {name: weights[ours] for name, ours in names.items() if ours in weights}
    return weights | family.entries


def detected(weights: dict[str, torch.Tensor]):
    """ComfyUI's description of the model in such a file."""
    detection = comfy.model_detection
    return detection.model_config_from_unet(weights, "") or detection.model_config_from_diffusers_unet(weights)
