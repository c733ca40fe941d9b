"""Scheduled hooks of a conditioning in a sampling that goes up, from the picture to the noise.

The host moves on from one keyframe of a schedule to the next and never back, as noise levels sink.
"""

import torch
from comfy.model_patcher import ModelPatcher


class HookSchedule:
    """Sets hooks to the keyframes that a sampler on its way down the same levels would be at."""

    def __init__(self, patcher: ModelPatcher, conditionings: list[list[dict]], sigmas: torch.Tensor):
        groups = [entry["hooks"] for entries in conditionings for entry in entries if entry.get("hooks") is not None]
        self.patcher = patcher
        self.hooks = list({id(hook): hook for group in groups for hook in group.hooks}.values())
        self.options = {"sample_sigmas": sigmas}
        self.levels = sigmas.sort(descending=True).values.cpu()  # the host compares them one by one

    def go_to(self, sigma: float) -> None:
        """To be called ahead of the evaluation at this noise level."""
        if all(hook.hook_keyframe.is_empty() for hook in self.hooks):
            return
        for hook in self.hooks:
            hook.reset()
            for level in self.levels[self.levels > sigma * (1 + 1e-4)]:
                hook.hook_keyframe.prepare_current_keyframe(curr_t=level, transformer_options=self.options)
        # The host notices changes that it makes itself.
        self.patcher.cached_hook_patches.clear()
        self.patcher.patch_hooks(None)
