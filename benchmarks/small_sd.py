"""A UNet shaped as Stable Diffusion 1.x's, but small enough for a test: two resolutions, four heads."""

import comfy.supported_models

SETTINGS = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    num_res_blocks=[1, 1],
    channel_mult=(1, 2),
    transformer_depth=[1, 1],
    transformer_depth_middle=1,
    transformer_depth_output=[1, 1, 1, 1],
    context_dim=32,
    use_spatial_transformer=True,
    legacy=False,
    use_linear_in_transformer=False,
    adm_in_channels=None,
    use_temporal_attention=False,
)


class SmallSD(comfy.supported_models.SD15):
    """ComfyUI's description of it, which its loaders do not know."""

    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}
