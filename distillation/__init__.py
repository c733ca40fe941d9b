"""An edit distilled into a small feed-forward network: pairs on disk, losses, training. Torch, numpy and Pillow only.

Parmar et al., "Zero-shot Image-to-Image Translation" (SIGGRAPH 2023), section 4.5, trains a conditional GAN on pairs that
the diffusion edit made. No code of it was released; what is here follows that section's idea, not its network.
"""
