"""The demo model's autoencoder: 8x smaller, 4 channels. The encoder and most of the decoder work at a quarter of the picture's
side or below; what makes edges crisp, at half and whole side, is a thin part of the decoder's own.
"""

from torch import Tensor, nn

from ..editing.metrics import peak_signal_to_noise


class _ResidualBlock(nn.Module):
    """Two convolutions beside the identity. `norm`: none where pictures are large, since it takes as long as they do there."""

    def __init__(self, channels: int, norm: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels) if norm else nn.Identity(),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class _Decoder(nn.Module):
    """Latents to pictures. `trunk` goes up to a quarter of the side, from where `coarse` writes the picture in squares of 4x4
    pixels; `fine` adds what those cannot hold, at half and whole side. `fine` begins as zero.
    """

    def __init__(self, wide: int, deep: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(4, deep, 3, padding=1),
            *(_ResidualBlock(deep) for _ in range(4)),
            nn.Conv2d(deep, 4 * wide, 3, padding=1),
            nn.PixelShuffle(2),
            *(_ResidualBlock(wide) for _ in range(3)),
        )
        self.coarse = nn.Sequential(nn.Conv2d(wide, 48, 3, padding=1), nn.PixelShuffle(4))
        self.fine = nn.Sequential(
            nn.Conv2d(wide, 4 * 32, 1),
            nn.PixelShuffle(2),
            *(_ResidualBlock(32, norm=False) for _ in range(2)),
            nn.Conv2d(32, 4 * 16, 1),
            nn.PixelShuffle(2),
            *(_ResidualBlock(16, norm=False) for _ in range(2)),
            nn.Conv2d(16, 3, 3, padding=1),
        )
        nn.init.zeros_(self.fine[-1].weight)
        nn.init.zeros_(self.fine[-1].bias)

    def forward(self, latent: Tensor) -> Tensor:
        features = self.trunk(latent)
        return self.coarse(features) + self.fine(features)


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
        self.decoder = _Decoder(wide, deep)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels)

    def decode(self, latent: Tensor, **_host_options: object) -> Tensor:
        return self.decoder(latent)

    def decode_coarse(self, latent: Tensor) -> Tensor:
        """The picture without its fine part, which takes more than half of the time and is trained in a stage of its own."""
        return self.decoder.coarse(self.decoder.trunk(latent))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over the whole tensors, for values in -1..1."""
    return peak_signal_to_noise((a - b).square().mean() / 4)
