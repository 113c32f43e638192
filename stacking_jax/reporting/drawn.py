"""A drawn figure, for a page and as a picture of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stacking_jax.reporting.svg import inline_svg

_LETTERS = 84  # About as many stand in a line of a legend, handles counted as six.


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure.

    Attributes:
      key: its name, also of its file.
      title, caption: what it shows, in words.
      figure: matplotlib's own.
      legend: (how it is drawn, name) of what a page names outside the figure; only a picture,
        which stands alone, shows it.
    """

    key: str
    title: str
    caption: str
    figure: Any
    legend: tuple[tuple[Mapping[str, Any], str], ...] = ()

    def svg(self) -> str:
        """As an <svg> element of a page, without the legend."""
        return inline_svg(self.figure, self.key, f"{self.title}. {self.caption}")

    def write_png(self, folder: Path) -> Path:
        """Writes KEY.png into `folder`, with the legend above the axes; returns its path."""
        from matplotlib.lines import Line2D

        path, tight = folder / f"{self.key}.png", {}
        legend = None
        if self.legend:
            handles = [Line2D([], [], lw=1.5, ms=6, mec="white", **style) for style, _ in
                       self.legend]
            names = [name for _, name in self.legend]
            columns = max(1, _LETTERS // (max(map(len, names)) + 6))
            legend = self.figure.legend(
                handles, names, loc="lower left", ncols=min(columns, len(names)),
                bbox_to_anchor=(0.1, 0.98), fontsize=8, frameon=False, columnspacing=1.2,
            )  # fmt: skip
            for text in legend.get_texts():  # Names are words, whatever they hold.
                text.set_parse_math(False)
            tight = {"bbox_inches": "tight", "pad_inches": 0.08}
        try:
            self.figure.savefig(path, dpi=130, facecolor="white", **tight)
        finally:
            if legend is not None:
                legend.remove()
        return path
