"""The demo model's autoencoder: 8x smaller, 4 channels, all convolutions at a quarter of the picture's side or below."""

from torch import Tensor, nn

from ..editing.metrics import peak_signal_to_noise


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class LightAutoencoder(nn.Module):
    """Deterministic autoencoder with the two methods that `comfy.sd.VAE` calls.

    Pictures are [B, 3, H, W] in -1..1 with sides divisible by 8; latents are [B, 4, H/8, W/8].
    """

    def __init__(self, wide: int = 40, deep: int = 80) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, wide, 3, padding=1),
            _ResidualBlock(wide),
            nn.Conv2d(wide, deep, 3, 2, 1),
            _ResidualBlock(deep),
            _ResidualBlock(deep),
            nn.GroupNorm(8, deep),
            nn.SiLU(),
            nn.Conv2d(deep, 4, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(4, deep, 3, padding=1),
            _ResidualBlock(deep),
            _ResidualBlock(deep),
            nn.Conv2d(deep, 4 * wide, 3, padding=1),
            nn.PixelShuffle(2),
            _ResidualBlock(wide),
            _ResidualBlock(wide),
            nn.Conv2d(wide, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def encode(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels)

    def decode(self, latent: Tensor, **_host_options: object) -> Tensor:
        return self.decoder(latent)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over the whole tensors, for values in -1..1."""
    return peak_signal_to_noise((a - b).square().mean() / 4)
