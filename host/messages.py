"""What nodes say of themselves while they run and when they have finished, in English.

The frontend shows a line in its own language where `locales/LANGUAGE/main.json` has it (`web/node_texts.js` recognizes it by the
English text), so that a message is one line, and all that changes in it stands in braces.
"""

# On the way.
INVERTING = "Inverting {step}/{steps}"
GENERATING = "Generating {step}/{steps}"
SAMPLING = "Sampling {step}/{steps}"
GUIDED = "Guided step {step}/{steps}, layout off by {distance}"
EDITING = "Editing {step}/{steps}"
REDRAWING = "Redrawing without an edit {step}/{steps}"
SENTENCES = "Encoding sentences {step}/{steps}"
READING_MAPS = "Reading attention maps {step}/{steps}"
RECORDING_MAPS = "Recording attention maps {step}/{steps}"
FEW_PAIRS = "Only {pairs} pairs: {enough} and more do better."
TRAINING = "Step {step} of {steps}, loss {loss}, {left} left"
OF_SEVERAL = "Picture {number}/{count}: {text}"

# What stays on the node.
EXACT = "Reconstruction: exact, as every step is corrected. Without correction: not measured."
NOT_MEASURED = "Reconstruction: not measured. This method does not correct what is lost."
MEASURED_EXACT = (
    "Reconstruction without correction: {figures} dB PSNR in the latent; corrected at every step, so that it is exact."
)
MEASURED = "Reconstruction without correction: {figures} dB PSNR in the latent; this method does not correct it."
CHANGED = "{percent} % of the picture could change."
SAVED = "Saved {file}"

# What a person should know, without which the result surprises.
UNLEARNED = "This model has not learned {words}. What such a word names is not drawn."
LEFT_OUT = "preset {preset} leaves out {names}."
NOT_GUIDED = (
    "guidance_strength: the edit changes the whole picture, so it is not guided. To guide it all the same, set "
    "local_blend to 0."
)
OTHER_CAPTION = (
    "The caption {caption} is not the one that the picture was inverted with, or was encoded otherwise. The words may name "
    "the wrong maps."
)
OTHER_SOURCE = (
    "The source text is not the one that the picture was inverted with, or was encoded otherwise. Words may be matched to "
    "the wrong parts of the picture."
)
SWAPPED = (
    "positive and negative seem to be swapped: positive is the text of the inversion, and negative is not. Connect Apply "
    "Direction to positive."
)
NO_EDIT = "positive is the text of the inversion, unedited: the picture comes back as it was. Connect Apply Direction."
OTHER_NEGATIVE = (
    "negative is not the text of the inversion. For a picture that was inverted, connect the unedited caption, or what is "
    "not edited may change."
)
OTHER_REFERENCE_NEGATIVE = (
    "negative is not the one that the picture was generated with: what is not edited may change too. Connect the same "
    "one."
)
OTHER_TEXT = (
    "positive is not the inversion's text moved along a direction, but another text: what it says otherwise is drawn too. "
    "Connect the caption of the inversion to Apply Direction."
)
WHOLE_PICTURE = (
    "The two texts differ over the whole picture, as for another light or style. If the edit comes out faint, choose the preset "
    "{preset}."
)
OTHER_CFG = (
    "cfg is {cfg}, but the picture was generated with {reference}: what is not edited may change too. Use the same cfg."
)
LARGE = (
    "The picture is {width}x{height}, {times} times the area that this model draws best (about {side}x{side}). It takes long, "
    "and edits come out worse: put Crop to Edit ahead of VAE Encode."
)
HALF_PRECISION = "Memory is short: the inversion is kept in half precision."
FEW_MAPS = "Memory is short: {size} are left for attention maps. Those that do not fit are computed for each edit."
NO_UNET = (
    "This model is no UNet. feature_until does nothing here; local_blend, guidance_strength and mask hold the picture."
)
STEP_DISTILLED = (
    "This model is made to draw in few steps, where inversion and edits lose much. Use its base model: {base}."
)
WORDS_ONLY = (
    "This text encoder's texts have no fixed length: the direction is the words themselves. Connect clip and caption to Apply "
    "Direction, which exchanges them."
)
TOKEN_NUMBERS = "A part of this model's texts are token numbers, which cannot be mixed: it is that of the new words."
OUT_OF_MEMORY = (
    "Out of memory in a guided step. The edit goes on with less memory and more time, as with the preset low memory."
)
NOT_AT_ONCE = (
    "Memory does not hold both texts at once in guided steps. What another node does with both, as NAGuidance does, is left "
    "out there."
)
ONE_BY_ONE = (
    "The preset official evaluates the texts one by one in guided steps. What another node does with both, as NAGuidance "
    "does, is left out there."
)


def messages() -> dict[str, str]:
    """Each message by its name."""
    return {name.lower(): text for name, text in globals().items() if name.isupper()}
