"""The report of an inversion on the real server: on the node, as an output, and kept with the inversion."""

import re

from pix2pix_zero.devtools.graphs import example_graph


def test_the_report_stays_on_the_node_and_is_kept_with_the_inversion(server):
    graph = example_graph()
    inversion = graph.only("Pix2PixZeroInversion")
    graph.change(inversion, steps=3, method="fixed-point", fixed_point_iterations=2, measure_reconstruction=True)
    shown = graph.add("PreviewAny", source=inversion[3])
    graph.keep(shown)
    reports, texts = [], []
    for _ in range(2):
        messages = []
        outputs = server.run(graph.api(server.object_info()), messages.append)
        reports += outputs[shown.key]["text"]
        texts.append([message.text for message in messages if message.text and message.node == inversion.key])
    assert reports[0] == reports[1] == texts[0][-1]
    assert float(re.search(r"([\d.]+) dB", reports[0])[1]) > 25
    assert texts[0][:-1] == [
        f"{phase} {step}/3" for phase in ("Inverting", "Redrawing without an edit") for step in (1, 2, 3)
    ]
    assert texts[1] == [], "the second run takes all from the first"
