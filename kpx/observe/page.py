"""An explanation as one page of HTML that needs no network: its data, styles and script are all in it."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

_TEMPLATE = pathlib.Path(__file__).with_name("page.html")


def write(explanation: dict[str, Any], path: str | os.PathLike) -> pathlib.Path:
    """Writes the page of `Explanation.to_dict()`; gives its path."""
    # Inside a script element, `</` and `<!--` would end or comment it.
    contents = json.dumps(explanation).replace("<", "\\u003c")
    page = pathlib.Path(path)
    page.write_text(_TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", contents), encoding="utf-8")
    return page
