"""What holds for all tests."""

import gc
import warnings

import pytest


@pytest.fixture(autouse=True, scope="module")
def nothing_left_behind():
    """Event loops that kernels and pages leave to the collector go with their module, not amid a later test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
