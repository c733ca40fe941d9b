"""A graph on the demo model with the steps of an edit, for the pictures of the help pages."""

from .graphs import EDITS, Graph, Node


class Demo(Graph):
    """A graph on the demo model: the picture, its caption and its inversion, and edits of it."""

    def __init__(self, edit: str = "cat2dog", seed: int = 114) -> None:
        super().__init__()
        self.edit = EDITS[edit]
        self.model = self.add("Pix2PixZeroDemoModel")
        self.scene = self.add("Pix2PixZeroDemoScene", seed=seed, **self.edit.scene)
        self.caption = self.add(
            "Pix2PixZeroCaption", captioner=self.add("Pix2PixZeroLoadCaptioner")[0], image=self.scene[0]
        )
        self.source = self.encode(self.caption[0])
        self.latent = self.add("VAEEncode", pixels=self.scene[0], vae=self.model[2])
        self.inversion = self.invert()

    def work_on(self, picture: Node, **knobs: object) -> None:
        """Caption and invert another picture, the first output of a node. `knobs`: of the inversion."""
        self.scene = picture
        self.caption = self.copy(self.caption, image=picture[0])
        self.source = self.encode(self.caption[0])
        self.latent = self.copy(self.latent, pixels=picture[0])
        self.inversion = self.invert(**knobs)

    def work_on_part(self, context: float) -> Node:
        """Work on the part of the scene around its animal; the node that cuts it out."""
        image, mask = self.scene[0], self.scene[1]
        part = self.add("Pix2PixZeroCrop", image=image, mask=mask, model_size=128, context=context, shape="square")
        self.work_on(part)
        return part

    def encode(self, text: object) -> Node:
        """The conditioning of a text."""
        return self.add("CLIPTextEncode", clip=self.model[1], text=text)

    def invert(self, **knobs: object) -> Node:
        """The inversion of the scene."""
        return self.add(
            "Pix2PixZeroInversion",
            model=self.model[0],
            positive=self.source[0],
            latent_image=self.latent[0],
            **knobs,
        )

    def direction(self, source: str | None = None, target: str | None = None) -> Node:
        """The direction of the edit, or another one."""
        return self.add(
            "Pix2PixZeroEditDirection",
            clip=self.model[1],
            source=source or self.edit.source,
            target=target or self.edit.target,
        )

    def apply(self, direction: list | None = None, strength: float | None = None) -> Node:
        """The edited caption."""
        return self.add(
            "Pix2PixZeroApplyDirection",
            conditioning=self.source[0],
            direction=direction or self.direction()[0],
            strength=self.edit.strength if strength is None else strength,
        )

    def sample(self, positive: Node | None = None, inversion: Node | None = None, **knobs: object) -> Node:
        """The guided sampler."""
        return self.add(
            "Pix2PixZeroKSampler",
            model=self.model[0],
            inversion=(inversion or self.inversion)[0],
            positive=(positive or self.apply())[0],
            negative=self.source[0],
            **{"cfg": self.edit.cfg, **knobs},
        )

    def decode(self, samples: list) -> list:
        """The picture of a latent."""
        return self.add("VAEDecode", samples=samples, vae=self.model[2])[0]

    def edited(self, *where: Node | None, **knobs: object) -> list:
        """The picture that the guided sampler draws."""
        return self.decode(self.sample(*where, **knobs)[0])

    def batch(self, first: list, second: list) -> list:
        """Two pictures or batches as one batch."""
        return self.add("ImageBatch", image1=first, image2=second)[0]

    def stock(self, model: list, positive: list, cfg: float) -> list:
        """The picture that the stock sampler draws from the inversion's noise."""
        guider = self.add("CFGGuider", model=model, positive=positive, negative=self.source[0], cfg=cfg)
        return self.decode(
            self.add(
                "SamplerCustomAdvanced",
                noise=self.add("DisableNoise")[0],
                guider=guider[0],
                sampler=self.add("KSamplerSelect", sampler_name="euler")[0],
                sigmas=self.inversion[2],
                latent_image=self.inversion[1],
            )[0]
        )

    def mask_picture(self, mask: list) -> list:
        """A mask as a picture."""
        return self.add("MaskToImage", mask=mask)[0]
