"""Rendering: a template, a JSON document and plotly's own script as one self-contained page."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placer.errors import InvalidInput

if TYPE_CHECKING:
    from markupsafe import Markup

_HERE = Path(__file__).parent
_NEEDED = ("jinja2", "plotly")


def require() -> None:
    """Check that pages can be made here.

    Raises
    ------
    InvalidInput
        When jinja2 or plotly is not installed.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInput(
            f"a page needs {' and '.join(missing)}, not installed here: pip install 'placer[report]'"
        )


def render(template: str, document: Mapping[str, Any], **context: Any) -> str:
    """A page.

    Parameters
    ----------
    template : str
        A file of this package; every value that it writes is escaped.
    document : mapping
        What the page embeds as its one JSON block; `figures` in it are drawn where the template names them.
    **context
        What else the template writes.
    """
    require()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = {name: Markup((_HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js")}
    html: str = environment.get_template(template).render(
        data=embedded(document),
        style=own["page.css"],
        script=own["page.js"],
        plotly=Markup(get_plotlyjs()),
        **context,
    )
    return html


def embedded(document: Mapping[str, Any]) -> Markup:
    r"""A JSON document that can stand in a script element, whatever its texts hold.

    Examples
    --------
    >>> print(embedded({"name": "</script>\u2028"}))
    {"name": "\u003c/script\u003e\u2028"}
    """
    from markupsafe import Markup

    text = json.dumps(document, allow_nan=False, ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
