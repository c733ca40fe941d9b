"""The teacher of the demo's students: what tells its pairs from another teacher's."""

import pytest
from pix2pix_zero.demo_model.training.teacher import what_is_shared
from pix2pix_zero.distillation.pairs import PairError, PairFolder
from pix2pix_zero.nodes import NODES


def test_pairs_of_other_defaults_of_the_nodes_are_another_teachers(tmp_path, monkeypatch):
    PairFolder(tmp_path, what_is_shared("cat2dog", 15)).begin()
    PairFolder(tmp_path, what_is_shared("cat2dog", 15)).begin()
    (sampler,) = (node for node in NODES if node.__name__ == "Pix2PixZeroKSampler")
    schema = sampler.GET_SCHEMA()
    (cfg,) = (item for item in schema.inputs if item.id == "cfg")
    monkeypatch.setattr(cfg, "default", cfg.default + 1)
    monkeypatch.setattr(sampler, "GET_SCHEMA", classmethod(lambda cls: schema))
    with pytest.raises(PairError, match="another defaults"):
        PairFolder(tmp_path, what_is_shared("cat2dog", 15)).begin()
