"""Figures of the measurements, drawn as those of the other reports."""

from __future__ import annotations

import numpy as np

from stacking_jax.lab import population
from stacking_jax.lab.measure import SHIFTS
from stacking_jax.lab.results import FAMILIES, Results, law_fits
from stacking_jax.reporting.drawn import Drawn
from stacking_jax.reporting.plots import run_style
from stacking_jax.reporting.svg import FAINT, INK, new_axes

ATTENTION = ("linear", "softmax")


def draw(results: Results) -> list[Drawn]:
    """All figures.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib import style

    with style.context("default"):
        return [
            *[_depth(results, family) for family in FAMILIES],
            *[_reach(results, target) for target in results.settings.target_losses],
            *[_shift(results, shift, attention) for shift in SHIFTS for attention in ATTENTION],
            *[_loops(results, attention) for attention in ATTENTION],
            _preconditioner(results),
            _dominance(results),
        ]


def _figure():
    figure, axes = new_axes()
    axes.set_position((0.135, 0.135, 0.835, 0.835))
    return figure, axes


def _legend(axes, **how) -> None:
    axes.legend(fontsize=7.5, frameon=True, framealpha=0.85, edgecolor="none", **how)


def _legend_above(axes, rows: int, columns: int) -> None:
    """Where curves end in every corner."""
    axes.set_position((0.135, 0.135, 0.835, 0.835 - 0.045 * rows))
    _legend(axes, ncols=columns, loc="lower right", bbox_to_anchor=(1.01, 1.0), columnspacing=1.1)


def _log_axis(axes) -> None:
    """A logarithmic loss axis; below two decades powers of ten would leave it without numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 100 * low:
        at = MaxNLocator(6).tick_values(low, high)
        if high > 3 * low:
            at = [of * 10.0**power for power in range(-6, 5) for of in (1, 2, 5)]
        at = [of for of in at if low <= of <= high]
        axes.set_yticks(at, [f"{value:g}" for value in at])
        axes.set_yticks([], minor=True)


def _band(axes, x, values, *, axis, **how) -> None:
    """The geometric mean over seeds, and their range as a band."""
    axes.plot(x, np.exp(np.log(values).mean(axis)), ms=4, mec="white", mew=0.5, **how)
    axes.fill_between(
        x, values.min(axis), values.max(axis), color=how["color"], alpha=0.13, lw=0
    )  # fmt: skip


def _shown(results: Results, losses: np.ndarray) -> np.ndarray:
    """Losses as cells hold them: what diverged lies at the cap."""
    return np.minimum(losses, results.settings.cap)


def _cap_line(axes, results: Results) -> None:
    cap = results.settings.cap
    if axes.get_ylim()[1] > 0.5 * cap:
        axes.axhline(cap, color=INK, lw=0.8)
        axes.annotate(f"{cap:g}: diverged", (0.01, cap), xycoords=("axes fraction", "data"),
                      xytext=(0, -10), textcoords="offset points", fontsize=8)  # fmt: skip


def _whole_ticks(axes, at) -> None:
    axes.set_xticks(list(at), [f"{value:g}" for value in at])
    axes.set_xticks([], minor=True)


def _depth(results: Results, family: str) -> Drawn:
    figure, axes = _figure()
    for i, kappa in enumerate(results.settings.kappas):
        style = run_style(i)
        for kind, dashes in (("untied", "-"), ("tied", (0, (4, 1.5)))):
            depths = results.arms()[f"{family} {kind}"]
            losses = np.stack([results.final(f"{family} {kind}", d)[i] for d in depths])
            losses = _shown(results, losses)
            _band(
                axes, depths, losses, axis=1, color=style["color"], marker=style["marker"],
                ls=dashes, lw=1.4, label=f"κ = {kappa}, {kind}",
            )  # fmt: skip
    for target in results.settings.target_losses:
        axes.axhline(target, color=FAINT, lw=0.8, ls=":")
    axes.set_xlabel("depth [layers or loops]")
    axes.set_ylabel("relative loss, held out")
    _whole_ticks(axes, depths)
    _log_axis(axes)
    _legend_above(axes, 2, 4)  # A column per condition number.
    return Drawn(
        f"icl_depth_{family.replace(' ', '_')}", f"Loss against depth: {family}",
        "Solid: a layer of its own at every position; dashed: one layer looped. Mean over seeds, "
        "and their range. Dotted: the losses whose depth is looked for.", figure,
    )  # fmt: skip


def _reach(results: Results, target: float) -> Drawn:
    figure, axes = _figure()
    kappas = np.array(results.settings.kappas)
    names = [f"{family} {kind}" for family in FAMILIES for kind in ("untied", "tied")]
    for i, arm in enumerate(names):
        color = run_style(i // 2)["color"]  # A family's.
        how = {"ls": "", "marker": "oD"[i % 2], "zorder": 3}
        reached = results.reached(arm, target)
        # Eight arms at the same condition numbers would lie on each other.
        at = kappas * 1.055 ** (i - (len(names) - 1) / 2)
        rows = np.array([[of.depth if of.known else np.nan for of in row] for row in reached])
        for of_seed in rows.T:
            axes.plot(at, of_seed, ms=2.5, color=color, alpha=0.6, **how)
        # A mean over the seeds that got there would be of the lucky ones.
        axes.plot(at, rows.mean(axis=1), ms=6, color=color, **how)
        for kappa, row in zip(at, reached, strict=True):
            for sign, marker in (("<=", "v"), (">", "^")):
                bounds = {of.depth for of in row if of.sign == sign}
                axes.plot([kappa] * len(bounds), sorted(bounds), ls="", marker=marker, ms=6,
                          mfc="none", mec=color)  # fmt: skip
        fits = law_fits(results, arm, target)
        judged = len(fits) > 1
        axes.plot([], [], ms=6, color=color, label=arm + ("" if judged else ", no fit"), **how)
        if judged:
            fitted = kappas[~np.isnan(rows[:, [fit["seed"] for fit in fits]]).all(axis=1)]
            fine = np.geomspace(fitted[0], fitted[-1], 80)
            for law, f, dashes in (("sqrt", np.sqrt, "-"), ("log", np.log, (0, (1.5, 1.5)))):
                lines = [fit[law]["offset"] + fit[law]["slope"] * f(fine) for fit in fits]
                axes.plot(fine, np.mean(lines, axis=0), color=color, ls=dashes, lw=1.1)
    axes.set_xscale("log")
    _whole_ticks(axes, kappas)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("κ, largest condition number of the tasks")
    axes.set_ylabel(f"depth at relative loss {target:g} [layers]")
    _legend_above(axes, 4, 2)
    return Drawn(
        f"icl_depth_to_reach_{target:g}".replace(".", "_"),
        f"The depth that diversity needs (loss {target:g})",
        "Large marks: means, where every seed's depth is known; small ones: seeds. Hollow "
        "triangles are bounds, and no points of a fit: down, the smallest depth reaches the loss "
        "already; up, the largest does not. Lines: fits per seed, averaged, where two seeds have "
        "one; solid √κ, dotted log κ. Stacks stand side by side at the same κ, in the order of "
        "the legend.", figure,
    )  # fmt: skip


def _shift(results: Results, shift: str, attention: str) -> Drawn:
    figure, axes = _figure()
    for i, blocks in enumerate(("restricted", "full")):
        for kind, dashes in (("untied", "-"), ("tied", (0, (4, 1.5)))):
            arm = f"{attention} {blocks} {kind}"
            depths = results.arms()[arm]
            ratio = np.stack([
                np.exp(np.log(_shown(results, results.read(arm, d, shift)) / np.minimum(
                    results.final(arm, d), 1.0)).mean(axis=0))
                for d in depths
            ])  # fmt: skip
            style = run_style(i)
            _band(axes, depths, ratio, axis=1, color=style["color"], marker=style["marker"],
                  ls=dashes, lw=1.5, label=arm)  # fmt: skip
    axes.axhline(1, color=INK, lw=0.8)
    _log_axis(axes)
    axes.set_xlabel("depth [layers or loops]")
    axes.set_ylabel("loss under shift / loss, at most 1")
    _whole_ticks(axes, depths)
    _legend_above(axes, 2, 2)
    settings = results.settings
    said = {
        "wider": f"condition numbers up to {settings.wider:g} times those of training",
        "larger": f"covariances {settings.larger:g} times as large as in training",
    }[shift]
    return Drawn(
        f"icl_shift_{shift}_{attention}", f"Covariance shift, {attention} stacks: {said}",
        "Geometric mean over κ; bands: the range over seeds. Higher is worse. A loss above 1 "
        "before the shift counts as 1, that of predicting zero.", figure,
    )  # fmt: skip


def _loops(results: Results, attention: str) -> Drawn:
    figure, axes = _figure()
    settings = results.settings
    depth = max(d for d in settings.softmax_depths if d in settings.depths)
    middle = len(settings.kappas) // 2
    arms = [arm for arm in results.arms() if arm.startswith(attention)]
    for i, arm in enumerate(arms):
        losses = _shown(results, results.read(arm, depth, "by_position")[middle])
        style = run_style(i)
        _band(axes, np.arange(1, losses.shape[-1] + 1), losses, axis=0, color=style["color"],
              marker=style["marker"], ls=style["linestyle"], lw=1.3, label=arm)  # fmt: skip
    axes.axvline(depth, color=FAINT, lw=0.9, ls=":")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 1e-6), high)
    _log_axis(axes)
    _cap_line(axes, results)
    axes.set_xlabel("loops or layers run at test")
    axes.set_ylabel("relative loss, held out")
    _legend_above(axes, -(-len(arms) // 2), 2)
    return Drawn(
        f"icl_loops_{attention}", f"More and fewer loops than in training, {attention} stacks "
        f"(κ = {settings.kappas[middle]})",
        f"Trained at {depth} positions (dotted), read after each; untied stacks have no more. "
        f"A prompt counts for {settings.cap:g} at the most: a mean there has diverged.", figure,
    )  # fmt: skip


def _preconditioner(results: Results) -> Drawn:
    figure, axes = _figure()
    for i, pairs in enumerate(results.settings.preconditioner_pairs):
        cell = results.cells[f"preconditioner/{pairs}"]
        style = run_style(i)
        _band(axes, cell["steps"], np.array(cell["distance"], float), axis=0,
              color=style["color"], marker=style["marker"], lw=1.4, label=f"n = {pairs}")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(r"$\|S^{1/2} A\, S^{1/2} - I\|\ /\ \sqrt{d}$")
    _legend(axes)
    return Drawn(
        "icl_preconditioner", "The learnt preconditioner and the inverse covariance",
        f"Tied restricted linear stack, {results.settings.preconditioner_loops} loops, one "
        "covariance. 0: A is its inverse.", figure,
    )  # fmt: skip


def _dominance(results: Results) -> Drawn:
    figure, axes = _figure()
    settings = results.settings
    dashes = ["-", (0, (4, 1.5)), (0, (1.5, 1.5))]
    for i, loops in enumerate(settings.dominance_loops):
        for j, pairs in enumerate(settings.dominance_pairs):
            cell = results.cells[f"dominance/{loops}/{pairs}"]
            style = run_style(i)
            for seed, (loss, ratio) in enumerate(zip(cell["loss"], cell["ratio"], strict=True)):
                kept = [
                    (x, y) for x, y in zip(loss, ratio, strict=True)
                    if x is not None and y is not None and x > 1e-7
                ]  # fmt: skip
                axes.plot(*zip(*kept, strict=True), color=style["color"], ls=dashes[j % 3], lw=1,
                          alpha=0.8, label=None if seed else
                          f"ℓ = {loops}, n {'→ ∞' if pairs == 0 else f'= {pairs}'}")  # fmt: skip
    axes.axhline(population.BOUND, color=INK, lw=1)
    axes.annotate("1/16", (0.99, population.BOUND), xycoords=("axes fraction", "data"),
                  xytext=(0, 3), textcoords="offset points", ha="right", fontsize=8.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 1e-3), 100 * high)
    axes.set_xlabel("population loss (training goes to the right)")
    axes.set_ylabel(r"$\|\nabla L\|^2\ /\ L^{(2\ell-1)/\ell}$")
    _legend(axes, ncols=3, loc="upper left")
    return Drawn(
        "icl_dominance", "Gradient dominance along gradient descent",
        "A line per seed. With finite n the loss has a floor above zero, where the gradient "
        "vanishes and the ratio with it: the theorem speaks of losses that are not yet small.",
        figure,
    )  # fmt: skip
