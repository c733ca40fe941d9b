"""What most tests of the host work on; a file that needs another model or CLIP has a fixture of its own."""

import pytest


@pytest.fixture(scope="module")
def model():
    """A small UNet with random weights, loaded."""
    from small_unet import loaded_small_model

    return loaded_small_model()


@pytest.fixture(scope="module")
def clip():
    """A small CLIP with random weights."""
    from tiny_clip import tiny_clip

    return tiny_clip()
