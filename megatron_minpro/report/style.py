"""How every picture of this program looks: colours, axes, and the way it is saved."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor looked for

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from checkpoints_convert.atomic_files import write_atomically

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2a5db0", "#d9722b", "#3a8f5c", "#8a4fa3", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)  # one per curve
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "figure.dpi": 150,
    "legend.frameon": False,
}


@contextmanager
def style() -> Iterator[None]:
    """Figures made in this block look like ours."""
    with plt.rc_context(_STYLE):
        yield


def set_title(axes: Axes, title: str) -> None:
    """The title of a panel."""
    axes.set_title(title, loc="left", fontsize=11, color="#333333")


def set_powers_of_two(axes: Axes, values: list[int]) -> None:
    """A logarithmic x-axis with a tick at each value."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG, whole or not at all, and close it."""
    image = io.BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight")
    plt.close(figure)
    write_atomically(path, image.getvalue(), durable=False)
    return path
