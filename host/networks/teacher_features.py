"""The teacher's own networks as a feature extractor: no other network has to be downloaded."""

import copy

import torch
from comfy.sd import VAE
from torch import Tensor, nn


class EncoderFeatures(nn.Module):
    """Feature maps of a VAE's encoder: call with pictures [B, 3, H, W] in 0..1, get a list of maps, shallow to deep.

    The encoder is copied, so that the host's stays as it is. Its maps are taken where its sides get smaller, and at its end.
    """

    def __init__(self, vae: VAE, device: torch.device | str):
        super().__init__()
        with torch.inference_mode(False):
            encoder = copy.deepcopy(vae.first_stage_model.encoder)
            for module in encoder.modules():  # tensors of inference mode cannot take part in a graph
                for held in (module._parameters, module._buffers):
                    for name, tensor in held.items():
                        if tensor is not None:
                            plain = tensor.detach().float().to(device).clone()
                            held[name] = nn.Parameter(plain, False) if held is module._parameters else plain
        self.encoder = encoder.eval()
        self._process = vae.process_input
        self._maps: list[Tensor] = []
        smaller = [module for module in encoder.modules() if isinstance(module, nn.Conv2d) and module.stride[0] > 1]
        last_norm = [module for module in encoder.modules() if isinstance(module, nn.GroupNorm)][-1:]
        for module in [*smaller, *last_norm]:
            module.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._maps.append(inputs[0])

    def forward(self, pictures: Tensor) -> list[Tensor]:
        self._maps = []
        last = self.encoder(self._process(pictures))
        maps, self._maps = [*self._maps, last], []
        return maps
