"""What every page of this program is made of: a template, scripts that its security policy names by hash, styles and data."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
import vl_convert

from megatron_minpro.report.page.script_data import script_json


def render(template: str, *, scripts: Sequence[str], style: str, data: Any, **values: Any) -> str:
    """One HTML file that holds everything it needs.

    Args:
        template: a text of Jinja2. It gets `scripts`, `script_hashes` for its security policy, `style`, and `data` as JSON for a script.
        scripts: in the order in which they run.
        style: of the page.
        data: what the scripts read.
        values: more for the template; texts are escaped.

    Raises:
        ValueError: a number of the data is not finite.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        scripts=scripts, script_hashes=[_hash(script) for script in scripts], style=style, data=script_json(data), **values
    )


def asset(name: str, *, package: str = __package__) -> str:
    """The text of a file beside the modules of a package."""
    return (files(package) / name).read_text(encoding="utf-8")


@functools.cache
def chart_library() -> str:
    """Vega, Vega-Lite and vega-embed, as one script that vl-convert makes of its own copies."""
    return vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lacks the default


def _hash(script: str) -> str:
    """How the page's security policy names a script that may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
