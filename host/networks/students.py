"""Students: image networks that the host's Load Upscale Model knows, here trained to make one edit at the same size.

spandrel, which ComfyUI brings, is imported late: it is not one of its essential packages.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ...editing.writing import write_whole

if TYPE_CHECKING:
    from spandrel import ModelDescriptor

NOISE_LEVEL = 15 / 255  # the fourth channel that spandrel gives a DRUNet
SMALL_WIDTHS = (16, 32, 40, 112)  # 0.71 million weights, 1.4 MB in half precision
SMALL_BLOCKS = 2  # spandrel recognizes no fewer
LARGE_WIDTH = 32
LARGE_BLOCKS = {
    "enc_blk_nums": [1, 1, 1, 28],
    "middle_blk_num": 1,
    "dec_blk_nums": [1, 1, 1, 1],
}  # 17 million weights, 34 MB
SIDE = 8  # the network halves a picture three times
FORMAT = "pix2pix_zero.student"  # of the metadata


class DrunetStudent(nn.Module):
    """DRUNet (Zhang et al., TPAMI 2021) as spandrel calls it: pictures [B, 3, H, W] in 0..1, of 8 pixels a side and more.

    It begins as the identity, exactly. Nothing in it pools over the picture: a tile comes out as in the whole picture, but for
    its margin. `widths`: channels of the four levels, from the picture's own size to an eighth; 6 of the first and 12 of the
    second hold the picture at the beginning, the others what is learnt.
    """

    def __init__(self, widths: tuple[int, ...] = SMALL_WIDTHS, blocks: int = SMALL_BLOCKS):
        super().__init__()
        from spandrel.architectures.DRUNet import DRUNet

        self.network = DRUNet(in_nc=4, out_nc=3, nc=list(widths), nb=blocks)
        self._become_identity()

    def forward(self, pictures: Tensor) -> Tensor:
        height, width = pictures.shape[-2:]
        padded = pictures
        if height % SIDE or width % SIDE:
            padded = F.pad(pictures, (0, -width % SIDE, 0, -height % SIDE), "reflect")
        edited = self.network(torch.cat([padded, torch.full_like(padded[:, :1], NOISE_LEVEL)], 1))
        return edited[..., :height, :width]

    @torch.no_grad()
    def _become_identity(self) -> None:
        """Three channels carry the picture from head to tail past the network, the others do not reach the tail."""
        network = self.network
        network.m_head.weight[:, 3].mul_(1 / NOISE_LEVEL)  # the one constant input of a network without biases
        network.m_head.weight[:3] = 0
        network.m_tail.weight.zero_()
        for channel in range(3):
            network.m_head.weight[channel, channel, 1, 1] = 1
            network.m_tail.weight[channel, channel, 1, 1] = 1
        up, *blocks = network.m_up1
        up.weight[:, :3] = 0
        for block in blocks:
            block.res[-1].weight[:3] = 0
        self._show_the_picture_again()

    @torch.no_grad()
    def _show_the_picture_again(self) -> None:
        """Twelve channels of the half-size level carry the picture's pixels past its blocks to the last blocks.

        Only they can take a line out of the picture to the pixel, and without it they would not see where it is.
        """
        network = self.network
        *down_blocks, down = network.m_down1
        low_up, *low_blocks = network.m_up2
        up = network.m_up1[0]
        for block in down_blocks:
            block.res[-1].weight[:3] = 0
        for block in low_blocks:
            block.res[-1].weight[:12] = 0
        low_up.weight[:, :12] = 0
        down.weight[:12] = 0
        up.weight[:12] = 0
        for number, (channel, row, column) in enumerate(itertools.product(range(3), range(2), range(2))):
            down.weight[number, channel, row, column] = 1
            up.weight[number, 3 + channel, row, column] = 1


class NafnetStudent(nn.Module):
    """NAFNet (Chen et al., ECCV 2022) in its authors' shape for deblurring: pictures [B, 3, H, W] in 0..1 of any size.

    It begins as the identity, exactly. It weighs its channels by their means over the picture: a tile is not what it is in the
    whole picture.
    """

    def __init__(self, width: int = LARGE_WIDTH, blocks: dict[str, object] | None = None):
        super().__init__()
        from spandrel.architectures.NAFNet import NAFNet

        self.network = NAFNet(img_channel=3, width=width, **(blocks or LARGE_BLOCKS))
        with torch.no_grad():
            for parameter in self.network.ending.parameters():
                parameter.zero_()

    def forward(self, pictures: Tensor) -> Tensor:
        return self.network(pictures)


MAKERS = {"small": DrunetStudent, "large": NafnetStudent}


def make_student(size: str = "small", seed: int = 0) -> nn.Module:
    """An untrained student that returns its input. Raises ValueError without spandrel, or for an unknown size."""
    if size not in MAKERS:
        raise ValueError(f"size: {size!r} is not one of {', '.join(MAKERS)}.")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MAKERS[size]()
    except ImportError as failure:
        raise ValueError(
            "size: students are made of the package spandrel, which is missing. Install it as ComfyUI's "
            "requirements.txt says: pip install spandrel"
        ) from failure


def save_student(student: nn.Module, path: Path, facts: dict[str, object]) -> None:
    """Write a student as *Load Upscale Model* reads it, whole or not at all. `facts` go to its metadata."""
    content = student_bytes(student, facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def student_bytes(student: nn.Module, facts: dict[str, object]) -> bytes:
    """The safetensors file of a student, in half precision. Raises ValueError if its weights are not finite."""
    state = {
        key: value.detach().half().cpu().contiguous().clone() for key, value in student.network.state_dict().items()
    }
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError("The student's weights are NaN or infinite. Train again with a lower learning rate.")
    return save(state, {"format": FORMAT} | {name: _text(value) for name, value in facts.items()})


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def load_student(path: Path) -> ModelDescriptor:
    """The file as the host's own *Load Upscale Model* loads it: a spandrel model descriptor."""
    import comfy.utils
    from spandrel import ModelLoader

    return ModelLoader().load_from_state_dict(comfy.utils.load_torch_file(str(path), safe_load=True)).eval()


def upscale_model(path: Path) -> ModelDescriptor:
    """The UPSCALE_MODEL of a student's file, as *Load Upscale Model* gives it."""
    import comfy.model_management
    import comfy.model_patcher

    student = load_student(path)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    student.patcher = patcher(
        student.model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return student
