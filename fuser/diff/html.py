"""A diff as one page that needs nothing else: its data, its script and its style, and a policy that lets no other run."""

import base64
import hashlib
import json
import re
from importlib.resources import files

from fuser.diff.document import Document

LAST = "viewer.js"  # starts the page; the other scripts only declare
# What could end a script element, or a line of one, is written as an escape of JSON.
ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def html(document: Document) -> str:
    """The page. Nothing in a model can end the element that holds the data, and only this script and style may run."""
    page = files("fuser.diff").joinpath("page")
    scripts = sorted(
        (file for file in page.iterdir() if file.name.endswith(".js")), key=lambda f: (f.name == LAST, f.name)
    )
    script = "\n".join(file.read_text(encoding="utf-8") for file in scripts)
    style = page.joinpath("viewer.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    parts = {"csp": policy, "style": style, "document": json_text(document), "script": script}
    template = page.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def json_text(document: Document) -> str:
    """The document as JSON that may stand in a script element."""
    text = json.dumps(document.to_json(), ensure_ascii=False, separators=(",", ":"))
    return text.translate(ESCAPES)


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
