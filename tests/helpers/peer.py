"""diffusers' pix2pix-zero pipeline and a ComfyUI MODEL with the same weights."""

import comfy.model_base
import comfy.model_patcher
import torch
from comfy.model_base import ModelType
from comfy.utils import unet_to_diffusers
from diffusers import UNet2DConditionModel
from diffusers.pipelines.deprecated.stable_diffusion_variants import pipeline_stable_diffusion_pix2pix_zero as theirs
from pix2pix_zero.benchmarks.peer_pipeline import peer_pipeline
from small_unet import CONFIG, CONTEXT_DIM, SmallSD

SHARPNESS = 3.0


def twins(prediction_type: str = "epsilon", seed: int = 0) -> tuple:
    """(pipeline, MODEL): attention at two resolutions and in the middle, maps neither flat nor one-hot.

    The MODEL is made in inference mode, as in the executor.
    """
    unet = _diffusers_unet(seed)
    pipe = peer_pipeline(unet, prediction_type, halvings=1)
    kind = {"epsilon": ModelType.EPS, "v_prediction": ModelType.V_PREDICTION}[prediction_type]
    with torch.inference_mode():
        return pipe, _comfyui_model(unet, kind)


def share_shifts(monkeypatch, shifts: list[torch.Tensor]) -> None:
    """Make the pipeline draw the given shifts, [channels, scales] for each roll, channel by channel, scale by scale."""
    queue = [shift for roll in shifts for shift in roll.flatten().tolist()]

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def randint(self, high, size, generator=None):
            shift = queue.pop(0)
            assert 1 <= shift <= high, "a shift of another scale"
            return torch.full(size, shift)

    monkeypatch.setattr(theirs, "torch", Torch())


def _diffusers_unet(seed: int) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=4,
            cross_attention_dim=CONTEXT_DIM,
        )
    for name, parameter in unet.named_parameters():
        if ".attn2.to_q" in name or ".attn2.to_k" in name:
            parameter.data *= SHARPNESS
    return unet.eval()


def _comfyui_model(unet: UNet2DConditionModel, kind: ModelType) -> comfy.model_patcher.ModelPatcher:
    config = SmallSD({**CONFIG, "model_channels": 32})
    config.manual_cast_dtype = None
    model = comfy.model_base.BaseModel(config, model_type=kind, device="cpu")
    names = unet_to_diffusers(config.unet_config)
    model.diffusion_model.load_state_dict({names[name]: weight.clone() for name, weight in unet.state_dict().items()})
    return comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
