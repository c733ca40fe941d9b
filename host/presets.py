"""What the guided sampler's `preset` stands for: how much of the guidance is computed, and what is kept meanwhile."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """`blocks`: the parts of the UNet whose maps are matched. `share` and `every`: see `GuidanceSchedule`.

    `checkpointing`: what the backward pass computes again, see `checkpointing.checkpointed`.
    """

    blocks: tuple[str, ...] = ("input", "middle", "output")
    share: float = 1.0
    every: int = 1
    checkpointing: str = "feed-forward"


PRESETS = {
    "default": Preset(),
    "fast": Preset(share=0.5, every=2),
    "low memory": Preset(checkpointing="blocks"),
    "official": Preset(),
}
