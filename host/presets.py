"""What the guided sampler's `preset` stands for: how much of the guidance is computed, and what is kept meanwhile."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """`guided_steps`: about how many of the steps guidance acts on, evenly spread; all of them if None.

    `checkpointing`: the least that the backward pass computes again, see `checkpointing.checkpointed`.
    """

    guided_steps: int | None = None
    checkpointing: str = "none"

    def every(self, steps: int) -> int:
        """Guidance acts on each so many-th of `steps`."""
        return 1 if self.guided_steps is None else math.ceil(steps / self.guided_steps)


PRESETS = {
    "default": Preset(),
    "fast": Preset(guided_steps=10),
    "low memory": Preset(checkpointing="blocks"),
    "official": Preset(),
}
