"""What a node does without an input is what its schema says."""

import inspect

import pytest
from pix2pix_zero.nodes import NODES


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_the_signature_has_the_schemas_inputs_and_defaults(node):
    parameters = inspect.signature(node.execute).parameters
    inputs = {each.id: each for each in node.GET_SCHEMA().inputs}
    assert list(parameters) == [name for name in parameters if name in inputs], "no unnamed or unknown inputs"
    assert parameters.keys() == inputs.keys()
    for name, parameter in parameters.items():
        default, own = getattr(inputs[name], "default", None), parameter.default
        if isinstance(own, tuple):  # of a node that takes lists: no item or one
            own = next(iter(own), None)
        if inputs[name].optional:
            assert own == default, f"{name}: an API prompt without it gets another value"
        else:
            assert own in (inspect.Parameter.empty, default), name
