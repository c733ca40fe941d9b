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


@pytest.fixture(autouse=True)
def without_dead_models():
    """ComfyUI forgets the models of a test that has ended.

    It collects garbage whenever it loads a model while another one has no ModelPatcher any more, for seconds in all.
    """
    yield
    import comfy.model_management

    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [model for model in loaded if not model.is_dead()]
