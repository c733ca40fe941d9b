"""How many times cheaper a student is than an edit by Stable Diffusion 1.5, whose weights nobody needs for that.

Operations are counted on the meta device. Times are the CPU's for one pass of each network with random weights, on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from ...host.networks.students import make_student
from ..cost_parts.counting import flop_counter
from ..cost_parts.unets import FULL

SIDE = 512
STEPS = 50
PASSES = 3.2  # of the UNet for a step of the default edit, inversion included: `bench cost`
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}


def networks(size: str = "small") -> dict[str, Callable[[str], tuple[nn.Module, Callable[[nn.Module], Tensor]]]]:
    """For each network a call that makes it on a device, and a pass of one picture of SIDE x SIDE through it."""
    side = SIDE // 8

    def unet(device: str):
        with torch.device(device):
            network = UNet2DConditionModel(**FULL.settings)
            inputs = torch.zeros(1, 4, side, side), torch.ones(1), torch.zeros(1, FULL.tokens, FULL.context_dim)
        return network, lambda network: network(*inputs).sample

    def autoencoder(device: str):
        with torch.device(device):
            network = AutoencoderKL(**VAE)
            picture = torch.zeros(1, 3, SIDE, SIDE)
        return network, lambda network: network.decode(network.encode(picture).latent_dist.mode()).sample

    def student(device: str):
        picture = torch.zeros(1, 3, SIDE, SIDE, device=device)
        return make_student(size).to(device), lambda network: network(picture)

    return {"UNet": unet, "VAE": autoencoder, "student": student}


@torch.no_grad()
def gmac(size: str = "small") -> dict[str, float]:
    """Billions of multiplications with their addition in one pass of each network."""
    found = {}
    for name, make in networks(size).items():
        network, run = make("meta")
        with flop_counter() as counter:
            run(network)
        found[name] = counter.get_total_flops() / 2e9
    return found


@torch.no_grad()
def seconds(size: str = "small") -> dict[str, float]:
    """Of the CPU, for one pass of each network in fp32 on one thread; it needs 6 GB of memory."""
    found = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, make in networks(size).items():
            network, run = make("cpu")
            run(network) if name == "student" else None
            begin = time.process_time()
            run(network)
            found[name] = time.process_time() - begin
            del network, run
    finally:
        torch.set_num_threads(threads)
    return found


def times(costs: dict[str, float]) -> float:
    """How many times the student's cost a whole edit is."""
    return (STEPS * PASSES * costs["UNet"] + costs["VAE"]) / costs["student"]


def report(timed: bool) -> tuple[dict[str, dict[str, float]], str]:
    """The figures, and lines that say them. `timed`: measure time too."""
    costs = {"gmac": gmac()} | ({"seconds": seconds()} if timed else {})
    lines = [f"An edit by SD 1.5 at {SIDE}x{SIDE} in {STEPS} steps beside a student:"]
    for kind, label in (("gmac", "GMAC"), ("seconds", "CPU s on one thread")):
        if kind in costs:
            parts = ", ".join(f"{name} {value:.4g}" for name, value in costs[kind].items())
            lines.append(f"{label}: {parts}; the edit is {times(costs[kind]):.0f} times the student")
    return costs, "\n".join(lines)
