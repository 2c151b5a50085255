"""Tests share two cores with each other's worker processes: one thread each is faster, and the same everywhere."""

import signal

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("repeatable")

# A shell that starts the tests in the background has SIGINT ignored, and every program that they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """The longest files first, so that two workers end together."""
    items.sort(key=lambda item: "/training/" not in item.nodeid)
