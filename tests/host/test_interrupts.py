"""An interrupt ends the work of every node: between two looks at it lies at most two seconds of work.

Timed by what the thread itself has worked, see `worked`, so that a busy machine changes nothing.
"""

import contextlib
import itertools
import shutil
import sys
import time

import comfy.model_management
import comfy.utils
import pytest
import torch
from node_inputs import NODE, run, usual_inputs, usual_values
from pair_runs import fill
from PIL import Image

import nodes as core

MOST_SECONDS = 2.0
WORKED = 1.0  # seconds of work after which the interrupt comes
LETTERS = "bcdfgklmnprst"
PLAIN = ["".join(letters) for letters in itertools.product(LETTERS, "aeiou", LETTERS, "ao")][:1500]
WORDS, OTHER_WORDS = (" ".join(word + ending * (n % 3 == 0) for n, word in enumerate(PLAIN)) for ending in ("", "s"))


def worked() -> float:
    """Seconds that this thread has computed.

    On Linux without those that the system took to give it memory: a virtual machine takes three for each gigabyte that
    nothing in it has used before.
    """
    if sys.platform != "linux":
        return time.thread_time()
    import resource

    return resource.getrusage(resource.RUSAGE_THREAD).ru_utime


@pytest.fixture(scope="module")
def usual():
    return usual_values()


@pytest.fixture(autouse=True)
def one_thread():
    """So that `worked` counts work, not the waiting for torch's other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def watch(monkeypatch):
    """The looks at the host's interrupt flag, as its server takes them too, whenever a progress bar moves."""
    look = comfy.model_management.throw_exception_if_processing_interrupted

    class Watch:
        begin = last = longest = 0.0
        watches = interrupted = False

        def __enter__(self):
            self.watches = True
            self.begin = self.last = worked()
            return self

        def pause(self):
            if not self.watches:
                return
            now = worked()
            self.longest = max(self.longest, now - self.last)
            self.last = now
            if now - self.begin > WORKED and not self.interrupted:
                self.interrupted = True
                comfy.model_management.interrupt_current_processing()

        def __exit__(self, *_):
            self.longest = max(self.longest, worked() - self.last)
            self.watches = False
            comfy.model_management.interrupt_current_processing(False)

    watching = Watch()

    def throw():
        watching.pause()
        look()

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", throw)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *_, **__: throw())
    return watching


def pictures(count, side):
    return torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(0))


def latents(count, side):
    return {"samples": torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(0))}


# Much work for each node: what its inputs allow, or what keeps it busy for much longer than the interrupt waits.
MUCH = {
    "ApplyDirection": lambda u: {"clip": u["CLIP"]},
    "AttentionHeatmap": lambda u: {"words": ", ".join(["cat", "photo"] * 50), "caption": "a photo of a cat"},
    "Caption": lambda u: {"image": pictures(400, 128), "max_new_tokens": 200},
    "CombineDirections": lambda u: {},
    "Crop": lambda u: {"image": pictures(6, 1024), "mask": torch.ones(1, 1024, 1024), "model_size": 3072},
    "DemoDistilled": lambda u: {"edit": "cat2dog"},
    "DemoModel": lambda u: {},
    "DemoScene": lambda u: {"count": 20, "side": 1024},
    "EditDirection": lambda u: {"source": "cat " * 70, "target": "dog " * 70, "alignment": "words"},
    "EditDirectionFromSentences": lambda u: {
        "source_sentences": "\n".join([WORDS] * 20),
        "target_sentences": "\n".join([OTHER_WORDS] * 20),
        "alignment": "words",
    },
    "EditMetrics": lambda u: {"source": pictures(40, 512), "edited": pictures(40, 512)},
    "FeaturePCA": lambda u: {"inversion": inversion(u, 16, 16, 2)},
    "FlowEdit": lambda u: {"steps": 1000, "latent_image": latents(4, 32), "samples": 16},
    "Inversion": lambda u: {"steps": 1000, "latent_image": latents(4, 32), "fixed_point_iterations": 20},
    "KSampler": lambda u: {"inversion": inversion(u, 4, 32, 2)},
    "NoiseReport": lambda u: {"noise": latents(24, 128)},
    "PasteEdit": lambda u: {
        "source": pictures(8, 1024),
        "edited": pictures(8, 512),
        "edited_area": torch.ones(8, 64, 64),
        "grow": 256,
        "feather": 256,
        "match_colours": 1.0,
    },
    "PlugAndPlay": lambda u: {},
    "PromptToPrompt": lambda u: {
        "source": WORDS,
        "target": OTHER_WORDS,
        "inversion": inversion({**u, "CONDITIONING": core.CLIPTextEncode().encode(u["CLIP"], WORDS)[0]}, 1, 4, 1),
    },
    "Reference": lambda u: {"steps": 1000, "latent_image": latents(4, 32)},
    "Sentences": lambda u: {"concept": "cat " * 70, "count": 10000},
    "Strengths": lambda u: {"values": ",".join(["1"] * 100)},
    "Strip": lambda u: {"images": pictures(100, 512), "columns": 10, "labels": "\n".join(["a cat"] * 100)},
}


def inversion(usual, batch, side, steps):
    given = dict(model=usual["MODEL"], positive=usual["CONDITIONING"], latent_image=latents(batch, side), steps=steps)
    return run(NODE["Inversion"], given).result[0][0]


def check_interrupt(watch, node, given):
    ended = None
    with watch, contextlib.suppress(comfy.model_management.InterruptProcessingException):
        ended = run(node, given)
    assert watch.longest < MOST_SECONDS
    assert ended is None or not watch.interrupted, "it went on after the interrupt"


@pytest.mark.parametrize("name", MUCH)
@torch.inference_mode()
def test_an_interrupt_ends_the_work_of_a_node(name, usual, watch):
    check_interrupt(watch, NODE[name], {**usual_inputs(NODE[name], usual), **MUCH[name](usual)})


@pytest.mark.parametrize("preset", ["default", "low memory"])
def test_an_interrupt_ends_a_backward_pass_before_its_end(preset, usual, monkeypatch):
    calls, reached, looks = [], [], 0
    look, gradient = comfy.model_management.throw_exception_if_processing_interrupted, torch.autograd.grad

    def count_looks(*arguments, **settings):
        if len(arguments) < 3:  # of one operation
            return gradient(*arguments, **settings)
        calls.append(arguments)
        monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", throw)
        result = gradient(*arguments, **settings)
        reached.append(True)
        return result

    def throw():
        nonlocal looks
        looks += 1
        if looks == 3:
            comfy.model_management.interrupt_current_processing()
        look()

    monkeypatch.setattr(torch.autograd, "grad", count_looks)
    with torch.inference_mode():
        given = {
            **usual_inputs(NODE["KSampler"], usual),
            "preset": preset,
            "guidance_strength": 0.3,
            "feature_until": 0.0,
        }
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(NODE["KSampler"], given)
    assert len(calls) == 1 and not reached
    assert looks == 3


@pytest.fixture(scope="module")
def large_picture(tmp_path_factory):
    """Its file."""
    path = tmp_path_factory.mktemp("large") / "large.png"
    Image.fromarray((pictures(1, 4096)[0] * 255).byte().numpy()).save(path, compress_level=1)
    return path


@pytest.fixture
def files(folders, blip_models, large_picture, run_node):
    """What the nodes of files work on: a folder of a large picture, pairs, a model of words."""
    (folders / "input" / "scenes").mkdir()
    shutil.copy(large_picture, folders / "input" / "scenes")
    fill(run_node)
    return folders


# Direction files are small; a model of words and a picture come in one read each.
MUCH_OF_FILES = {
    "FolderPicture": lambda: {"folder": "scenes", "index": 0},
    "LoadCaptioner": lambda: {"model_name": "tiny"},
    "SavePair": lambda: {"source": pictures(20, 1024), "edited": 1 - pictures(20, 1024), "dataset": "large"},
    "Distill": lambda: {"dataset": "swap", "name": "swap", "steps": 100000, "batch": 64},
}


@pytest.mark.parametrize("name", MUCH_OF_FILES)
@torch.inference_mode()
def test_an_interrupt_ends_the_work_with_files(name, files, watch):
    check_interrupt(watch, NODE[name], MUCH_OF_FILES[name]())


def test_every_node_is_interrupted():
    small = {"SaveDirection", "LoadDirection"}  # their files are bounded by the length of texts
    assert set(MUCH) | set(MUCH_OF_FILES) | small == set(NODE)
