"""The picture of decoder features, against forward hooks on an untouched UNet and NumPy's SVD."""

import numpy as np
import pytest
import torch
from pix2pix_zero.editing.principal_components import as_colours, principal_components
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from pix2pix_zero.nodes.feature_pca import Pix2PixZeroFeaturePCA
from small_unet import conditioning, latent, small_model

HEIGHT, WIDTH = 8, 12


@pytest.fixture(scope="module")
def inversion(model):
    with torch.inference_mode():
        off = NoiseRegularization(steps=0)
        picture = latent(batch=2, height=HEIGHT, width=WIDTH)
        return invert_latent(model, conditioning(rows=2), picture, InversionSettings(5, 0, off, "ddim"))


def svd_colours(features):
    """First three components of [N, C] by NumPy's SVD, each stretched to 0..1, largest loading positive."""
    centred = features - features.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:3]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1, keepdims=True), 1)
    coordinates = centred @ (directions * np.sign(largest)).T
    return (coordinates - coordinates.min(0)) / (coordinates.max(0) - coordinates.min(0))


def test_components_are_those_of_numpys_svd():
    features = np.random.default_rng(0).normal(size=(200, 24)) * np.linspace(3, 0.1, 24) + 5
    colours = as_colours(principal_components(torch.from_numpy(features).float()))
    assert np.abs(colours.numpy() - svd_colours(features)).max() < 1e-5


def test_fewer_features_than_colours_leave_the_rest_grey():
    colours = as_colours(principal_components(torch.tensor([[0.0], [2.0], [1.0]])))
    assert colours.tolist() == [[0.0, 0.5, 0.5], [1.0, 0.5, 0.5], [0.5, 0.5, 0.5]]


@pytest.mark.parametrize(
    "kind, block, layer, size",
    [
        ("residual features", -1, lambda unet: unet.output_blocks[1][0].out_layers, (4, 6)),
        ("residual features", 3, lambda unet: unet.output_blocks[3][0].out_layers, (8, 12)),
        ("queries", -1, lambda unet: unet.output_blocks[1][1].transformer_blocks[-1].attn1.to_q, (4, 6)),
        ("keys", 2, lambda unet: unet.output_blocks[2][1].transformer_blocks[-1].attn1.to_k, (8, 12)),
        ("values", 0, lambda unet: unet.output_blocks[0][1].transformer_blocks[-1].attn1.to_v, (4, 6)),
    ],
)
def test_it_shows_the_features_of_all_pictures_in_common_colours(model, inversion, run_node, kind, block, layer, size):
    (pictures,) = run_node(Pix2PixZeroFeaturePCA, model=model, inversion=inversion, features=kind, percent=1.0,
                           decoder_block=block)  # fmt: skip
    fresh, seen = small_model().model, []
    layer(fresh.diffusion_model).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.inference_mode():
        # At 100 percent, the lowest level of the inversion.
        x, sigma = inversion.trajectory[1], inversion.sigmas[1].repeat(2)
        fresh.apply_model(x, sigma, c_crossattn=conditioning(rows=2)[0][0], transformer_options={})
    features = seen[0].flatten(2).transpose(1, 2) if seen[0].ndim == 4 else seen[0]
    expected = svd_colours(features.reshape(2 * size[0] * size[1], -1).double().numpy())
    scale = 8 * HEIGHT // size[0]
    expected = expected.reshape(2, *size, 3).repeat(scale, 1).repeat(scale, 2)
    assert pictures.shape == (2, 8 * HEIGHT, 8 * WIDTH, 3)
    assert np.abs(pictures.numpy() - expected).max() < 1e-3


def test_the_moment_follows_percent(model, inversion, run_node):
    early, late, latest = (
        run_node(Pix2PixZeroFeaturePCA, model=model, inversion=inversion, features="queries", percent=p)[0]
        for p in (0.0, 0.5, 1.0)
    )
    assert not torch.allclose(early, late, atol=1e-2)
    assert not torch.allclose(late, latest, atol=1e-2)


def test_nothing_stays_on_the_model(model, inversion, run_node):
    run_node(Pix2PixZeroFeaturePCA, model=model, inversion=inversion, features="values", percent=0.5)
    assert not any(module._forward_hooks for module in model.model.diffusion_model.modules())
    assert not any(model.wrappers.values())


@pytest.mark.parametrize("block, says", [(4, "decoder_block: 4 is not one of this model's, 0 to 3")])
def test_a_block_that_is_not_there_is_refused(model, inversion, run_node, block, says):
    with pytest.raises(ValueError, match=says):
        run_node(Pix2PixZeroFeaturePCA, model=model, inversion=inversion, features="queries", percent=0.5,
                 decoder_block=block)  # fmt: skip


def test_a_patch_that_leaves_out_keys_is_named(model, inversion, run_node):
    """As token merging does."""
    merged = model.clone()
    merged.set_model_attn1_patch(lambda q, k, v, options: (q, k[:, ::2], v[:, ::2]))
    inputs = {"model": merged, "inversion": inversion, "percent": 0.5}
    with pytest.raises(ValueError, match="^model: .* keys for .* places"):
        run_node(Pix2PixZeroFeaturePCA, **inputs, features="keys")
    assert run_node(Pix2PixZeroFeaturePCA, **inputs, features="queries")[0].isfinite().all()


def test_an_inversion_of_another_model_is_refused(inversion, run_node):
    with pytest.raises(ValueError, match="inversion: it was made with another model. Connect the same model"):
        run_node(Pix2PixZeroFeaturePCA, model=small_model(seed=5), inversion=inversion, features="queries", percent=0.5)


def test_the_server_draws_them(server):
    """Plug-and-Play and the picture of its features, wired as a user would, in the real executor."""
    from pix2pix_zero.devtools.graphs import Graph

    graph = Graph()
    demo = graph.add("Pix2PixZeroDemoModel")
    scene = graph.add("Pix2PixZeroDemoScene", subject="cat", seed=3)
    source, target, empty = (
        graph.add("CLIPTextEncode", clip=demo[1], text=text) for text in ("a photo of a cat", "a photo of a dog", "")
    )
    encoded = graph.add("VAEEncode", pixels=scene[0], vae=demo[2])
    inverted = graph.add("Pix2PixZeroInversion", model=demo[0], positive=source[0], latent_image=encoded[0], steps=4)
    patched = graph.add("Pix2PixZeroPlugAndPlay", model=demo[0], inversion=inverted[0])
    guider = graph.add("CFGGuider", model=patched[0], positive=target[0], negative=empty[0], cfg=2.5)
    drawn = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("DisableNoise")[0],
        guider=guider[0],
        sampler=graph.add("KSamplerSelect", sampler_name="euler")[0],
        sigmas=inverted[2],
        latent_image=inverted[1],
    )
    edited = graph.add("PreviewImage", images=graph.add("VAEDecode", samples=drawn[0], vae=demo[2])[0])
    features = graph.add("Pix2PixZeroFeaturePCA", model=demo[0], inversion=inverted[0])
    shown = graph.add("PreviewImage", images=features[0])
    outputs = server.run(graph.api(server.object_info()))
    for node in (edited, shown):
        assert server.view(outputs[node.key]["images"][0]).startswith(b"\x89PNG")
