"""What `stacking-jax lab icl` does: measure what is missing, judge, print, draw."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import stacking_jax
from stacking_jax import console
from stacking_jax.errors import UserError
from stacking_jax.lab import measure
from stacking_jax.lab.claims import judge
from stacking_jax.lab.keep import Kept
from stacking_jax.lab.page import claims_table, render_page
from stacking_jax.lab.results import Results, law_fits, steps
from stacking_jax.lab.settings import IclSettings


def icl(settings: IclSettings, out: str | Path) -> dict[str, Any]:
    """Measures, and writes `icl.json`, `icl.html` and `figures/*.png` into `out`.

    Cells that lie there under the same settings and versions are not measured again.

    Returns:
      What `icl.json` holds: settings, versions, seconds, claims, counts of violations of
      monotonicity, depths (with their sign: `=`, `<=`, `>`), fits and cells.

    Raises:
      UserError: `out` cannot be written.
    """
    out = Path(out)
    versions = _versions()
    try:
        kept = Kept(out, settings.to_dict(), versions)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from error
    cells = _measure(kept, settings)
    results = Results(cells, settings)
    claims = judge(results)
    found = {
        "settings": settings.to_dict(),
        "versions": versions,
        "seconds": round(sum(cell["seconds"] for cell in cells.values()), 1),
        "claims": [claim.to_dict() for claim in claims],
        "violations": {arm: steps(results, arm).totals() for arm in results.arms()},
        "laws": _by_target(settings, results, law_fits),
        "depth_to_reach": _by_target(settings, results, Results.reached),
        "cells": cells,
    }
    (out / "icl.json").write_text(json.dumps(found, allow_nan=False) + "\n", encoding="utf-8")
    _draw(results, claims, found, out)
    return found


def _by_target(settings: IclSettings, results: Results, what) -> dict[str, dict[str, Any]]:
    """`what(results, arm, target)` by target and arm."""
    return {
        f"{target:g}": {arm: what(results, arm, target) for arm in results.arms()}
        for target in settings.target_losses
    }


def show(found: dict[str, Any], out: str | Path, as_json: bool) -> None:
    """Prints the claims, or everything as one JSON object."""
    from stacking_jax.lab.claims import Claim
    from stacking_jax.lab.statistics import Interval
    from stacking_jax.reporting.command import terminal
    from stacking_jax.reporting.tables import render

    if as_json:
        print(json.dumps(found, allow_nan=False))
        return
    claims = [
        Claim(
            c["key"], c["text"], c["source"], c["measure"],
            Interval(c["mean"], c["low"], c["high"], c["seeds"]), c["bound"],
            below=c["below"], reason=c["reason"],
        )
        for c in found["claims"]
    ]  # fmt: skip
    print(render(claims_table(claims), **terminal()), end="")
    print(f"measured in {found['seconds']:.0f} s: {Path(out) / 'icl.html'}, icl.json, figures/")


def _measure(kept: Kept, settings: IclSettings) -> dict[str, Any]:
    work = {}
    for stack in measure.arms(settings):
        work[f"stack/{stack.arm}/{stack.depth}"] = (
            settings.steps * (stack.depth + 1),
            lambda advance, s=stack: measure.measure_stack(s, settings, advance),
        )
    for pairs in settings.preconditioner_pairs:
        work[f"preconditioner/{pairs}"] = (
            settings.preconditioner_steps,
            lambda advance, n=pairs: measure.measure_preconditioner(n, settings, advance),
        )
    for loops in settings.dominance_loops:
        for pairs in settings.dominance_pairs:
            work[f"dominance/{loops}/{pairs}"] = (
                settings.dominance_steps,
                lambda advance, of=(loops, pairs): measure.measure_dominance(
                    *of, settings, advance
                ),
            )
    total = sum(cost for cost, _ in work.values())
    start = sum(cost for name, (cost, _) in work.items() if kept.has(name))
    cells = {}
    # One bar over all: a step counts as many times as the stack has positions.
    with console.progress("measuring", total, "layer steps", start) as advance:
        for name, (cost, compute) in work.items():
            new = not kept.has(name)
            advance(0, name)
            cells[name] = kept.get(name, lambda compute=compute: compute(lambda steps: None))
            if new:
                advance(cost)
    return cells


def _draw(results: Results, claims: list, found: dict[str, Any], out: Path) -> None:
    try:
        from stacking_jax.lab.figures import draw

        figures = draw(results)
    except ImportError as error:
        console.warn(f"no figures: they need matplotlib ({error}); install the 'train' extra")
        figures = []
    (out / "figures").mkdir(exist_ok=True)
    for drawn in figures:
        drawn.write_png(out / "figures")
    (out / "icl.html").write_text(render_page(claims, figures, found), encoding="utf-8")


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "optax", "numpy")
    return {
        "stacking_jax": stacking_jax.__version__,
        **{name: metadata.version(name) for name in names},
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {sys.platform}",
    }
