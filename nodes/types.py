"""The pack's own socket types. Their names are part of shared workflow files and never change."""

from comfy_api.latest import io

Inversion = io.Custom("P2PZ_INVERSION")
Direction = io.Custom("P2PZ_DIRECTION")
Captioner = io.Custom("P2PZ_CAPTIONER")

CATEGORY = "pix2pix-zero"
