"""Figures of the measurements, drawn as those of the other reports."""

from __future__ import annotations

import numpy as np

from stacking_jax.lab import population
from stacking_jax.lab.claims import Results, law_fits
from stacking_jax.reporting.drawn import Drawn
from stacking_jax.reporting.plots import run_style
from stacking_jax.reporting.svg import FAINT, INK, new_axes


def draw(results: Results) -> list[Drawn]:
    """All figures.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib import style

    with style.context("default"):
        return [
            _depth(results, "linear restricted"),
            _depth(results, "linear full"),
            _depth(results, "softmax full"),
            _reach(results),
            _shift(results, "wider"),
            _shift(results, "larger"),
            _loops(results),
            _preconditioner(results),
            _dominance(results),
        ]


def _figure():
    figure, axes = new_axes()
    axes.set_position((0.135, 0.135, 0.835, 0.835))
    return figure, axes


def _legend(axes, **how) -> None:
    axes.legend(fontsize=7.5, frameon=True, framealpha=0.85, edgecolor="none", **how)


def _band(axes, x, values, *, axis, **how) -> None:
    """The geometric mean over seeds, and their range as a band."""
    axes.plot(x, np.exp(np.log(values).mean(axis)), ms=4, mec="white", mew=0.5, **how)
    axes.fill_between(
        x, values.min(axis), values.max(axis), color=how["color"], alpha=0.13, lw=0
    )  # fmt: skip


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
            _band(
                axes, depths, losses, axis=1, color=style["color"], marker=style["marker"],
                ls=dashes, lw=1.4, label=f"κ = {kappa}, {kind}",
            )  # fmt: skip
    axes.set_yscale("log")
    axes.axhline(results.settings.target_loss, color=FAINT, lw=0.8, ls=":")
    axes.set_xlabel("depth [layers or loops]")
    axes.set_ylabel("relative loss, held out")
    _whole_ticks(axes, depths)
    # Curves end in every corner: a column per condition number, above them.
    axes.set_position((0.135, 0.135, 0.835, 0.745))
    _legend(axes, ncols=4, loc="lower right", bbox_to_anchor=(1.01, 1.0), columnspacing=1.1)
    return Drawn(
        f"icl_depth_{family.replace(' ', '_')}", f"Loss against depth: {family}",
        "Solid: a layer of its own at every position; dashed: one layer looped. Mean over seeds, "
        "and their range. Dotted: the loss whose depth is looked for.", figure,
    )  # fmt: skip


def _reach(results: Results) -> Drawn:
    figure, axes = _figure()
    kappas = results.settings.kappas
    names = [
        f"linear {blocks} {kind}"
        for blocks in ("restricted", "full") for kind in ("untied", "tied")
    ]  # fmt: skip
    for i, arm in enumerate(names):
        style = run_style(i)
        rows = np.array(
            [[np.nan if v is None else v for v in row] for row in results.reached(arm)]
        )
        # A mean over the seeds that got there would be of the lucky ones.
        middle = np.where(np.isnan(rows).any(axis=1), np.nan, rows.mean(axis=1))
        if np.isnan(middle).all():
            axes.plot([], [], color=style["color"], marker=style["marker"], ls="",
                      label=f"{arm}: not reached")  # fmt: skip
            continue
        axes.plot(kappas, middle, ls="", marker=style["marker"], ms=6, color=style["color"],
                  label=arm)  # fmt: skip
        for of_seed in rows.T:
            axes.plot(kappas, of_seed, ls="", marker=style["marker"], ms=2.5,
                      color=style["color"], alpha=0.6)  # fmt: skip
        fits = law_fits(results, arm)
        fine = np.geomspace(kappas[0], kappas[-1], 80)
        for law, f, dashes in (("sqrt", np.sqrt, "-"), ("log", np.log, (0, (1.5, 1.5)))):
            if fits:
                lines = [fit[law]["offset"] + fit[law]["slope"] * f(fine) for fit in fits]
                axes.plot(fine, np.mean(lines, axis=0), color=style["color"], ls=dashes, lw=1.1)
    axes.set_xscale("log")
    _whole_ticks(axes, kappas)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("κ, largest condition number of the tasks")
    axes.set_ylabel(f"depth at relative loss {results.settings.target_loss:g} [layers]")
    _legend(axes, loc="upper left")
    return Drawn(
        "icl_depth_to_reach", "The depth that diversity needs",
        "Large marks: means, where every seed reached the loss; small ones: seeds. Lines: fits "
        "per seed, averaged; solid √κ, dotted log κ.", figure,
    )  # fmt: skip


def _shift(results: Results, shift: str) -> Drawn:
    figure, axes = _figure()
    for i, blocks in enumerate(("restricted", "full")):
        for kind, dashes in (("untied", "-"), ("tied", (0, (4, 1.5)))):
            arm = f"linear {blocks} {kind}"
            depths = results.arms()[arm]
            ratio = np.stack([
                np.exp(np.log(results.read(arm, d, shift) / results.final(arm, d)).mean(axis=0))
                for d in depths
            ])  # fmt: skip
            style = run_style(i)
            _band(axes, depths, ratio, axis=1, color=style["color"], marker=style["marker"],
                  ls=dashes, lw=1.5, label=arm)  # fmt: skip
    axes.axhline(1, color=INK, lw=0.8)
    if axes.get_ylim()[1] < 60:  # Powers of ten would leave such an axis without numbers.
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_yscale("log")
    axes.margins(y=0.1)
    axes.set_xlabel("depth [layers or loops]")
    axes.set_ylabel("loss under shift / loss")
    _whole_ticks(axes, depths)
    _legend(axes, loc="center right")
    settings = results.settings
    said = {
        "wider": f"condition numbers up to {settings.wider:g} times those of training",
        "larger": f"covariances {settings.larger:g} times as large as in training",
    }[shift]
    return Drawn(
        f"icl_shift_{shift}", f"Covariance shift: {said}",
        "Geometric mean over κ; bands: the range over seeds. Higher is worse.", figure,
    )  # fmt: skip


def _loops(results: Results) -> Drawn:
    figure, axes = _figure()
    settings = results.settings
    depth = max(d for d in settings.softmax_depths if d in settings.depths)
    middle = len(settings.kappas) // 2
    arms = ["linear restricted tied", "linear full tied", "linear full tied injected",
            "linear restricted untied", "linear full untied"]  # fmt: skip
    for i, arm in enumerate(arms):
        losses = results.read(arm, depth, "by_position")[middle]
        style = run_style(i)
        _band(axes, np.arange(1, losses.shape[-1] + 1), losses, axis=0, color=style["color"],
              marker=style["marker"], ls=style["linestyle"], lw=1.3, label=arm)  # fmt: skip
    axes.axvline(depth, color=FAINT, lw=0.9, ls=":")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 1e-6), min(high, 1e3))
    axes.set_xlabel("loops or layers run at test")
    axes.set_ylabel("relative loss, held out")
    _legend(axes)
    return Drawn(
        "icl_loops", f"More and fewer loops than in training (κ = {settings.kappas[middle]})",
        f"Trained at {depth} positions (dotted), read after each; untied stacks have no more. "
        "The loss axis ends at 1000: what leaves it diverges.", figure,
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
