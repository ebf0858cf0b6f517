"""Inspections as one self-contained page: no network, opens from disk."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coconut.inside.findings import READINGS, Inspection
from coconut.inside.lens import Lens

WEB = Path(__file__).parent / "web"
EXAMPLE = (
    "Every lempus is a jompus. Tom is a lempus. Every rempus is a zumpus. Sam is a rempus."
    " Is Tom a jompus or zumpus?"
)
"""Stands in the question box of a live page at first."""


def page(
    lens: Lens,
    twin: str,
    found: Sequence[Inspection],
    is_live: bool = False,
    kind: str | None = None,
) -> str:
    """The page of some inspections.

    is_live: with a box for questions to the server it came from. kind: the tree it opens with,
    see READINGS; else the model's own.
    """
    data = {
        "about": f"{lens.directory} | {twin} | {lens.config.method} | {lens.n_thoughts} thoughts",
        "kinds": READINGS,
        "own_reading": kind or lens.own_reading,
        "is_live": is_live,
        "example": EXAMPLE,
        "items": [page_item(one) for one in found],
    }
    library, script = ((WEB / name).read_text("utf-8") for name in ("dagre.min.js", "page.js"))
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in (library, script))
    connect = "'self'" if is_live else "'none'"
    parts = {
        # Only these two scripts run, whatever else might find its way into the page.
        "POLICY": f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline';"
        f" img-src data:; connect-src {connect}; base-uri 'none'; form-action 'none'",
        "STYLE": (WEB / "page.css").read_text("utf-8"),
        "LIBRARY": library,
        "SCRIPT": script,
        # Last: what it holds is never searched for the other marks.
        "DATA": _inside_script(data),
    }
    text = (WEB / "page.html").read_text("utf-8")
    for name, content in parts.items():
        text = text.replace(f"@{name}@", content, 1)
    return text


def page_item(found: Inspection) -> dict[str, Any]:
    """What the page shows of one inspection: all but every single head's attention."""
    item = found.as_json()
    for thought in item["thoughts"]:
        del thought["attention_heads"]
    return item


def _inside_script(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data)  # ASCII: what is not is escaped
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
