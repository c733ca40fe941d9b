"""The guider of an edit: the stock one, with the source's text beside positive and negative."""

import comfy.samplers
import torch

SOURCE = "source"


class EditGuider(comfy.samplers.CFGGuider):
    """A CFGGuider with a third conditioning, "source", that describes the picture given as the latent image.

    It is loaded with the others, but processed apart from them: the host hands ControlNets, GLIGEN boxes and areas on
    between conditionings, and what controls the edit is not for the source, nor the other way round.
    """

    def inner_sample(self, noise, latent_image, device, *args, **kwargs):
        picture = self.inner_model.process_latent_in(latent_image) if torch.any(latent_image) else latent_image
        source = {SOURCE: self.conds.pop(SOURCE)}
        self._source = comfy.samplers.process_conds(self.inner_model, noise, source, device, picture, seed=0)
        return super().inner_sample(noise, latent_image, device, *args, **kwargs)

    def add_source(self) -> None:
        """Put the source beside the other conditionings, once a sampler runs. The host cleans it up with them."""
        self.conds.update(self._source)
