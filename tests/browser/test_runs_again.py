"""What runs again in a graph that a person has wired: no more than what was changed asks for."""

import pytest
from hand_wired import wire_by_hand

DRAWING_AT_RANDOM = [
    "Pix2PixZeroInversion",
    "Pix2PixZeroDemoScene",
    "Pix2PixZeroReference",
    "Pix2PixZeroSentences",
    "Pix2PixZeroFlowEdit",
]


@pytest.mark.parametrize("kind", DRAWING_AT_RANDOM)
def test_the_seed_of_a_new_node_stays_from_run_to_run(kind, frontend):
    controls = frontend.page.evaluate(
        """kind => {
          const node = LiteGraph.createNode(kind);
          app.graph.add(node);
          return node.widgets.filter(one => one.options?.values?.includes?.('randomize')).map(one => one.value);
        }""",
        kind,
    )
    assert controls == ["fixed"]


def test_changing_cfg_alone_redraws_alone(frontend):
    wire_by_hand(frontend)
    assert frontend.run()["ending"][0] == "execution_success"
    frontend.set_widgets("cfg", 2.5)
    seen = frontend.run()
    assert seen["ending"][0] == "execution_success"
    again = ("Pix2PixZeroKSampler", "VAEDecode", "PreviewImage")
    assert sorted(set(seen["started"])) == sorted(key for kind in again for key in frontend.nodes(kind))
