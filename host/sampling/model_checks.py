"""Which models the pack can work on, and for the others why not, in words."""

from comfy import model_sampling as kinds

from ...editing.inversion import Inversion

USE = "Use a model that predicts eps or v: SD 1.x, SD 2.x, SDXL or one made from them."


def check_diffusion(model) -> None:
    """Raise ValueError unless a MODEL diffuses on discrete, variance-preserving steps and predicts eps or v."""
    reason = _reason_against(model.get_model_object("model_sampling"))
    if reason is not None:
        raise ValueError(f"model: {reason} {USE}")


def check_inversion(inversion: Inversion, model) -> None:
    """Raise ValueError as `check_diffusion`, and unless the inversion was made with this MODEL, patched or not."""
    check_diffusion(model)
    if inversion.model() is not model.model:
        raise ValueError(
            "inversion: it was made with another model. Connect the same model to Invert Picture and to this node."
        )


def _reason_against(sampling) -> str | None:
    if isinstance(sampling, _kinds("CONST", "COSMOS_RFLOW", "IMG_TO_IMG_FLOW")):
        return (
            "this one is a flow model (such as SD3, Flux, AuraFlow, Qwen or Wan). It mixes picture and noise along straight "
            "lines, on which DDIM inversion and its noise levels are not defined."
        )
    if isinstance(sampling, _kinds("StableCascadeSampling")):
        return "this one is Stable Cascade, which diffuses on a schedule and latents of its own, without a UNet's attention."
    if isinstance(sampling, _kinds("V_PREDICTION_DDPM")):
        return "this one is a video model that is trained on latents of another scale than DDIM inversion has."
    if isinstance(sampling, _kinds("X0", "IMG_TO_IMG")):
        return "this one predicts a picture and not the noise in it, so there is no noise that inversion could follow."
    if isinstance(sampling, _kinds("EDM", "ModelSamplingContinuousEDM")):
        return (
            "this one is an EDM model (such as CosXL, Playground 2.5, Cosmos or Stable Video Diffusion). It is trained on "
            "continuous noise levels, of which DDIM inversion has no grid."
        )
    if not isinstance(sampling, kinds.ModelSamplingDiscrete) or not isinstance(sampling, kinds.EPS):
        return f"its noise schedule ({type(sampling).__name__}) is not one that DDIM inversion is defined on."
    return None


def _kinds(*names: str) -> tuple[type, ...]:
    """Those of ComfyUI's classes that this version of it has."""
    return tuple(getattr(kinds, name) for name in names if hasattr(kinds, name))
