"""Inputs that several nodes have."""

from comfy_api.latest import io

from ..host.sampling.checks import SCHEDULERS


def scheduler_input() -> io.Combo.Input:
    """Of the nodes that lay out the steps of an inversion."""
    return io.Combo.Input(
        "scheduler",
        options=list(SCHEDULERS),
        default=SCHEDULERS[0],
        optional=True,
        advanced=True,
        tooltip="Which noise levels the steps lie on. ddim_uniform: the paper's. simple: for models that draw "
        "in 1 to 8 steps (LCM, Turbo, Lightning, Hyper), since it begins at pure noise and takes exactly as "
        "many steps as you ask for.",
    )
