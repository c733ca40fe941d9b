"""diffusers' own pix2pix-zero pipeline around a UNet of our choice."""

from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.deprecated.stable_diffusion_variants import pipeline_stable_diffusion_pix2pix_zero as theirs

SCHEDULE = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)


class DecodesNothing(AutoencoderKL):
    """In place of a VAE: the pipeline's inversion decodes what it inverted, which nobody asked for here."""

    def decode(self, latents, *args, **kwargs):
        return (latents.new_zeros(1, 3, 8, 8),)


def peer_pipeline(
    unet: UNet2DConditionModel, prediction_type: str = "epsilon", halvings: int = 3
) -> theirs.StableDiffusionPix2PixZeroPipeline:
    """The pipeline with Stable Diffusion's schedules; its VAE only tells how often a picture is halved."""
    settings = dict(**SCHEDULE, prediction_type=prediction_type)
    vae = DecodesNothing(block_out_channels=(8,) * (halvings + 1), norm_num_groups=8)
    pipe = theirs.StableDiffusionPix2PixZeroPipeline(
        vae=vae.to(unet.device, unet.dtype),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(**settings),
        feature_extractor=None,
        safety_checker=None,
        inverse_scheduler=DDIMInverseScheduler(**settings),
        caption_generator=None,
        caption_processor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
