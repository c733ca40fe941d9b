"""What the inversion tells about how well a picture comes back unedited."""

import logging

from ...editing.inversion import Inversion
from .. import progress


def reconstruction_report(inversion: Inversion) -> str:
    """One line: the PSNR of each picture if it was measured, and whether the sampler corrects what is lost."""
    corrected = inversion.residuals is not None
    if inversion.reconstruction_psnr is None:
        if corrected:
            return "Reconstruction: exact, as every step is corrected. Without correction: not measured."
        return "Reconstruction: not measured. This method does not correct what is lost."
    figures = ", ".join(f"{psnr:.1f}" for psnr in inversion.reconstruction_psnr.tolist())
    ending = "corrected at every step, so that it is exact" if corrected else "this method does not correct it"
    return f"Reconstruction without correction: {figures} dB PSNR in the latent; {ending}."


def show_and_log(reports: list[str]) -> None:
    """Leave the reports of all pictures on the running node, and in the log."""
    for report in reports:
        logging.info("Pix2Pix-Zero: %s", report)
    progress.show("\n".join(reports))
