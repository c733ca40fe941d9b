"""The demo model's parts, made of ComfyUI's own classes with small SD 1.x settings."""

import comfy.clip_model
import comfy.latent_formats
import comfy.model_base
import comfy.ops
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from torch import Tensor

CONTEXT_LENGTH = 77
TEXT_WIDTH = 64
EMBEDDING_ROWS = 256
SHARED_ROWS = 32
CLIP_VOCABULARY = 49408

TEXT_SETTINGS = {
    "num_hidden_layers": 2,
    "hidden_size": TEXT_WIDTH,
    "num_attention_heads": 4,
    "intermediate_size": 4 * TEXT_WIDTH,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": CONTEXT_LENGTH,
    "eos_token_id": 49407,
}
UNET_SETTINGS = {
    "image_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 4],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": -1,
    "num_head_channels": 32,
    "context_dim": TEXT_WIDTH,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_linear_in_transformer": False,
}


class SharedEmbedding(comfy.ops.manual_cast.Embedding):
    """Stock CLIP token ids in a few rows: `table` gives known words their own row, unknown words share the last ones."""

    def __init__(self, width: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        super().__init__(EMBEDDING_ROWS, width, dtype=dtype, device=device)
        first_shared = EMBEDDING_ROWS - SHARED_ROWS
        self.register_buffer("table", (torch.arange(CLIP_VOCABULARY) % SHARED_ROWS + first_shared).to(torch.int16))

    def forward(self, ids: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return super().forward(self.table.to(ids.device)[ids.long()].long(), out_dtype=out_dtype)

    def knows(self, ids: list[int]) -> bool:
        """Whether each of these tokens has a row of its own."""
        return bool((self.table[ids] < EMBEDDING_ROWS - SHARED_ROWS).all())


class DemoTextModel(comfy.clip_model.CLIPTextModel):
    def __init__(self, config: dict, dtype, device, operations) -> None:
        super().__init__(config, dtype, device, operations)
        self.set_input_embeddings(SharedEmbedding(TEXT_WIDTH, dtype, device))


class DemoClip(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}, **_unused) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=CONTEXT_LENGTH,
            textmodel_json_config=dict(TEXT_SETTINGS),
            model_class=DemoTextModel,
            return_projected_pooled=False,
            model_options=model_options,
        )


class DemoClipModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}, **_unused) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options, clip_model=DemoClip)

    def knows(self, ids: list[int]) -> bool:
        """Whether the model has learned each of these tokens; the others say nothing to it."""
        return self.clip_l.transformer.get_input_embeddings().knows(ids)


def _tokenizer(**settings) -> comfy.sd1_clip.SDTokenizer:
    return comfy.sd1_clip.SDTokenizer(max_length=CONTEXT_LENGTH, embedding_size=TEXT_WIDTH, **settings)


class DemoTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """CLIP's own byte-pair tokenizer, which ComfyUI ships."""

    def __init__(self, embedding_directory=None, tokenizer_data={}) -> None:
        super().__init__(embedding_directory, tokenizer_data, tokenizer=_tokenizer)


class DemoLatentFormat(comfy.latent_formats.LatentFormat):
    """Four channels, an eighth of the side; `scale_factor` comes with the weights.

    The colours of latent previews are a least-squares fit to 200 renders (R^2 0.78).
    """

    scale_factor = 1.0
    latent_rgb_factors = [[-0.068, 0.0, 0.281], [0.192, -0.034, -0.036], [0.185, 0.239, 0.145], [0.185, 0.221, 0.201]]
    latent_rgb_factors_bias = [0.024, 0.062, 0.061]


class DemoModelConfig(comfy.supported_models_base.BASE):
    unet_config = UNET_SETTINGS
    unet_extra_config: dict = {}
    latent_format = DemoLatentFormat
    supported_inference_dtypes = [torch.float32]
    memory_usage_factor = 0.1
    best_side = 128  # of its pictures, in pixels

    def model_type(self, state_dict, prefix="") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.V_PREDICTION

    def clip_target(self, state_dict={}) -> comfy.supported_models_base.ClipTarget:
        return comfy.supported_models_base.ClipTarget(DemoTokenizer, DemoClipModel)


def build_diffusion_model(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> comfy.model_base.BaseModel:
    """An untrained `comfy.model_base.BaseModel` with the demo's UNet."""
    config = DemoModelConfig(dict(UNET_SETTINGS))
    config.set_inference_dtype(dtype, None)
    return config.get_model({}, "", device=device)
