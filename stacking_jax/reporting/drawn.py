"""A drawn figure, for a page and as a picture of its own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stacking_jax.errors import UserError
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
        """Writes KEY.png into `folder`, with the legend above the axes; returns its path.

        Raises:
          UserError: the file cannot be written.
        """
        path, how = folder / f"{self.key}.png", {"dpi": 130, "facecolor": "white"}
        if not self.legend:
            return save_png(self.figure, path, **how)
        legend = self._add_legend()
        try:
            return save_png(self.figure, path, bbox_inches="tight", pad_inches=0.08, **how)
        finally:
            legend.remove()  # A page has its own.

    def _add_legend(self):
        from matplotlib.lines import Line2D

        names = [name for _, name in self.legend]
        handles = [Line2D([], [], lw=1.5, ms=6, mec="white", **style) for style, _ in self.legend]
        columns = max(1, _LETTERS // (max(map(len, names)) + 6))
        legend = self.figure.legend(
            handles, names, loc="lower left", ncols=min(columns, len(names)),
            bbox_to_anchor=(0.1, 0.98), fontsize=8, frameon=False, columnspacing=1.2,
        )  # fmt: skip
        for text in legend.get_texts():  # Names are words, whatever they hold.
            text.set_parse_math(False)
        return legend


def save_png(figure, out: Path, **how: Any) -> Path:
    """Saves matplotlib's figure as a PNG, whole or not at all; returns its path.

    Args:
      figure: what is saved.
      out: the file; its folder is made.
      **how: what `savefig` is told.

    Raises:
      UserError: the file cannot be written.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", **how)
        os.replace(temporary, out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    return out
