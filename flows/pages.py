"""The pages of `csm check` and `csm calibrate`: one file each, which loads nothing from elsewhere."""

import platform
from pathlib import Path
from typing import Any

import jinja2
import torch

from csm import __version__
from flows.measures import MEASURES, best_of


def render(template: str, **values: Any) -> str:
    """``templates/TEMPLATE`` with ``values``; every text in them is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # by name it would not be: templates end in .j2
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        measures=MEASURES,
        best=best_of,
        software=f"csm {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        **values,
    )
