"""Where Plug-and-Play puts the features in."""

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from pix2pix_zero.attention_patches.plug_and_play import ResidualSite, feature_site, self_attention_sites

SD15 = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=320,
    num_res_blocks=[2] * 4,
    channel_mult=[1, 2, 4, 4],
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_middle=1,
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    context_dim=768,
    num_heads=8,
    use_spatial_transformer=True,
    legacy=False,
)
SDXL = SD15 | dict(
    num_res_blocks=[2] * 3,
    channel_mult=[1, 2, 4],
    transformer_depth=[0, 0, 2, 2, 10, 10],
    transformer_depth_middle=10,
    transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
    context_dim=2048,
    num_heads=-1,
    num_head_channels=64,
    use_linear_in_transformer=True,
    num_classes="sequential",
    adm_in_channels=2816,
)


def test_the_blocks_of_stable_diffusion_are_the_papers():
    unet = UNetModel(**SD15, device="meta")
    assert feature_site(unet) == ResidualSite(4, 0)
    assert [site.number for site in self_attention_sites(unet, 4)] == list(range(4, 12))


def test_sdxl_has_its_features_at_the_same_distance_from_the_latent():
    unet = UNetModel(**SDXL, device="meta")
    assert feature_site(unet) == ResidualSite(1, 0)
    attention = self_attention_sites(unet, 1)
    assert [attention.count(site) for site in set(attention)] == [1] * 26
    assert {site.number for site in attention} == {1, 2, 3, 4, 5}
