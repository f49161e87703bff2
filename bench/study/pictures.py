"""The study's pictures: what each method gains over training alone, and how accuracy rises from round to round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import claims
import numpy as np
from joined import Curves
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coterie.comparison.record import Figures, Record
from coterie.report.plots import INK, LINE, MUTED, PALETTE
from coterie.report.plots.style import styled

ALONE = "local"
_REACH = (-100, 100)  # all gains
_NAMED = {  # others are grey
    "fedlease": PALETTE[1],
    "fedamole": PALETTE[3],
    "fedex_lora": PALETTE[4],
    "fedit": PALETTE[0],
    ALONE: PALETTE[2],
}


@styled
def gains(records: Mapping[str, Record]) -> Figure:
    """Each method's gain over training alone, with a panel for each federation.

    Small dots are seeds, a large one is their mean. The gain of a seed is over training alone with that seed;
    a seed without that is left out.
    """
    titles = _titles(records)
    figure = Figure(figsize=(9.6, 1.0 + 0.23 * len(titles)), layout="constrained")
    panels = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for ax, (name, record) in zip(panels, records.items(), strict=True):
        _gains(ax, record, titles)
        ax.set_title(name)
    panels[0].set_yticks(range(len(titles)), titles)
    panels[0].set_ylim(len(titles) - 0.4, -0.6)
    figure.supxlabel("gain in test accuracy over training alone, points", color=MUTED, fontsize=9)
    return figure


@styled
def by_round(records: Mapping[str, Record], curves: Mapping[str, Curves]) -> Figure:
    """The mean validation accuracy after each evaluated round, with a panel for each federation.

    A line is the mean over seeds, a band their range. Methods that have no colour of their own are grey.
    """
    figure = Figure(figsize=(7.0, 2.6), layout="constrained")
    panels = figure.subplots(1, len(records), squeeze=False)[0]
    for ax, (name, record) in zip(panels, records.items(), strict=True):
        for variant, row in record.variants.items():
            seeds = [curve for seed, curve in curves[name].get(variant, {}).items() if int(seed) in row.seeds]
            _curve(ax, seeds, _NAMED.get(variant), row.title)
        ax.set_title(name)
        ax.set_xlabel("round")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        ax.grid(axis="y")
    panels[0].set_ylabel("validation accuracy, %")
    drawn = {line.get_label(): line for ax in panels for line in ax.lines if not str(line.get_label()).startswith("_")}
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=len(drawn) or 1, fontsize=8)
    return figure


def _gains(ax: Axes, record: Record, titles: Sequence[str]) -> None:
    alone = {run.seed: run.mean or 0.0 for run in record.variants[ALONE].runs}
    ax.hlines(np.arange(len(titles)), *_REACH, color=LINE, linewidth=0.5, zorder=0)
    ax.axvline(0, color=MUTED, linewidth=1.0, linestyle=(0, (2, 3)), zorder=1)
    every = []
    for row in record.variants.values():
        paired = [run for run in row.runs if run.mean is not None and run.seed in alone]
        gained = [100 * ((run.mean or 0.0) - alone[run.seed]) for run in paired]
        if row.method == ALONE or not gained:
            continue
        colour, height = PALETTE[1] if row.method in claims.SYSTEMS else PALETTE[0], titles.index(row.title)
        ax.scatter(gained, [height] * len(gained), s=9, color=colour, alpha=0.6, linewidth=0)
        ax.scatter([np.mean(gained)], [height], s=46, color=colour, edgecolor=INK, linewidth=0.6, zorder=3)
        every += gained
    ax.set_xlim(min(every) - 1, max(every) + 1)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _curve(ax: Axes, seeds: Sequence[Mapping[str, float]], colour: str | None, title: str) -> None:
    """One method's curve over the rounds that all its seeds have."""
    rounds = sorted(int(rnd) for rnd in (seeds[0] if seeds else ()) if all(rnd in seed for seed in seeds))
    if not rounds:
        return
    values = 100 * np.array([[seed[str(rnd)] for rnd in rounds] for seed in seeds])
    if colour is None:
        ax.plot(rounds, values.mean(0), color=LINE, linewidth=1.0, zorder=1)
        return
    ax.fill_between(rounds, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0, zorder=2)
    ax.plot(rounds, values.mean(0), color=colour, linewidth=1.8, label=title, zorder=3)


def _titles(records: Mapping[str, Record]) -> list[str]:
    """All methods but training alone: those of the first federation by its accuracy, and after them the others."""
    rows = (row for record in records.values() for row in sorted(record.variants.values(), key=below))
    return list(dict.fromkeys(row.title for row in rows if row.method != ALONE))


def below(row: Figures) -> float:
    """What to sort rows by, so that the best one is first."""
    return -(row.mean or 0.0)
