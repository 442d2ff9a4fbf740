"""What tests of torch.compile share."""

import pytest
import torch

MARKS = [
    pytest.mark.usefixtures("nothing_compiled"),
    # Dynamo makes an instance of a Function where it traces one, and reads .grad of what a graph takes from another.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # Inductor, when it is imported
]


def marked(test):
    """The test, with all of them."""
    for mark in MARKS:
        test = mark(test)
    return test


class Counting:
    """A backend that counts the graphs it compiles; Dynamo's own counters are shared by all models."""

    def __init__(self, backend: str = "aot_eager"):
        self.compile, self.graphs = torch._dynamo.lookup_backend(backend), 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.compile(graph, inputs)
