"""Filter that compares a certificate, or a request for one, with what it should be."""

from __future__ import annotations

import json
from typing import Any


def certificate_differences(info: dict[str, Any], profile: dict[str, Any]) -> list[str]:
    """Return the fields of a certificate that are not as its profile wants them, sorted.

    Arguments:
        info: what `community.crypto.x509_certificate_info` or `openssl_csr_info` says of it.
        profile: the wanted values of those fields that matter. Names and usages may come in any order.
    """

    def comparable(value: Any) -> Any:
        return sorted(map(json.dumps, value)) if isinstance(value, list) else value

    return sorted(field for field, wanted in profile.items() if comparable(info.get(field)) != comparable(wanted))


class FilterModule:
    """Ansible's way to find the filter."""

    def filters(self) -> dict[str, Any]:
        """Return it by name."""
        return {"certificate_differences": certificate_differences}
