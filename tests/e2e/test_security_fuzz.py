"""Malformed input in numbers: the server goes on serving, and tells nobody what is not for them."""

from __future__ import annotations

import pytest
from tests.e2e.fuzz import fuzz


@pytest.mark.parametrize(
    ("transport", "inputs"),
    [
        ("envoy", 4000),
        ("proxy", 2000),
        pytest.param("envoy", 200_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_whatever_is_sent_the_server_goes_on_serving(tmp_path, transport, inputs):
    result = fuzz(tmp_path, inputs, seed=inputs, transport=transport)
    assert result["violations"] == []
    assert (result["unexpected_errors"], result["first_error"]) == (0, "")
    assert result["served_to_the_end"]
    assert result["inputs"] >= inputs
    before, after = result["resident_mib"]
    assert after < before + 150
