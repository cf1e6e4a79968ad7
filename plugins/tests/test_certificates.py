"""Filter for certificates (plugins/filter/certificates.py)."""

from __future__ import annotations

from typing import Any

import pytest

from filter.certificates import certificate_differences

PROFILE = {
    "subject_ordered": [["commonName", "app1"]],
    "subject_alt_name": ["DNS:app1", "IP:192.0.2.1"],
    "basic_constraints_critical": True,
}


@pytest.mark.parametrize(
    ("other", "differences"),
    [
        pytest.param({}, [], id="the same"),
        pytest.param({"subject_alt_name": ["IP:192.0.2.1", "DNS:app1"], "issuer": {}}, [], id="order and what does not matter"),
        pytest.param({"subject_ordered": [("commonName", "app1")]}, [], id="tuples"),
        pytest.param({"subject_alt_name": ["DNS:app1", "DNS:app2", "IP:192.0.2.1"]}, ["subject_alt_name"], id="a name more"),
        pytest.param({"subject_alt_name": ["DNS:app1"]}, ["subject_alt_name"], id="a name less"),
        pytest.param({"subject_alt_name": None}, ["subject_alt_name"], id="no names"),
        pytest.param({"subject_ordered": [["commonName", "app1"], ["commonName", "app2"]]}, ["subject_ordered"], id="another name"),
        pytest.param(
            {"subject_ordered": [], "basic_constraints_critical": False}, ["basic_constraints_critical", "subject_ordered"], id="two"
        ),
    ],
)
def test_a_certificate_is_compared_with_its_profile(other: dict[str, Any], differences: list[str]) -> None:
    assert certificate_differences(PROFILE | other, PROFILE) == differences
