"""What the guided sampler's `preset` stands for: how much of the guidance is computed, and what is kept meanwhile."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """`guided_steps`: about how many steps guidance would act on over the whole edit; all of them if None.

    `share`, `holds_negative`: see `editing.guidance.GuidanceSchedule`. `checkpointing`: the least that the backward pass
    computes again, see `checkpointing.checkpointed`.
    """

    guided_steps: int | None = None
    share: float = 1.0
    holds_negative: bool = False
    checkpointing: str = "none"

    def schedule(self, steps: int) -> dict[str, Any]:
        """Its part of a `GuidanceSchedule` for an edit of so many steps."""
        every = 1 if self.guided_steps is None else max(1, round(steps / self.guided_steps))
        return {"every": every, "share": self.share, "holds_negative": self.holds_negative}


PRESETS = {
    "default": Preset(),
    # Spread steps hold the layout as well as all do, up to about three times the strength each.
    "fast": Preset(guided_steps=16, share=0.8, holds_negative=True, checkpointing="feed-forward"),
    "low memory": Preset(checkpointing="blocks"),
    "official": Preset(),
}
