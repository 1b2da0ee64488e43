"""What a JSON file of ours says it is: its format and version, checked in one place."""

from __future__ import annotations

import json
from typing import Any

PLAN = "ellq.plan"
MODEL = "ellq.model"
VERSIONS = {PLAN: 2, MODEL: 1}  # those before are read too


def read_json(text: str | bytes, *formats: str, name: str) -> dict[str, Any]:
    """Return the object that a JSON text holds, once its ``format`` and ``version`` are ones this ellq reads.

    Args:
        text: what was read; bytes are decoded.
        *formats: the formats that are welcome, of ``VERSIONS``.
        name: what to call it in errors.

    Raises:
        ValueError: not JSON, of another format, or of a version this ellq does not know.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}).") from error
    found = data.get("format") if isinstance(data, dict) else None
    if found not in formats:
        raise ValueError(f"{name} has format {found!r}. Pass one of format {' or '.join(map(repr, formats))}.")
    version = data.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSIONS[found]:
        raise ValueError(
            f"{name} has version {version!r}; this ellq reads versions up to {VERSIONS[found]} of {found!r}."
        )
    return dict(data)
