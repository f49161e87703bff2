"""Chooses settings for every variant from the same grid, on validation data, with a seed that is not reported."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.comparison.variants import Point
from coterie.ops.metrics import better
from coterie.types import CoterieError

SEED = 1000  # of tuning, unless it is a reported one
ROUNDS = "run.rounds"


@dataclass(frozen=True)
class Choice:
    """What tuning chose: ``settings``, from the validation mean of everything that was ``tried`` (None: it failed).

    ``at_edge`` names the keys whose chosen number is the lowest or the highest that was tried: a wider grid may have a
    better one. ``rounds`` are those of the runs that chose, where these were not the reported runs'.
    """

    settings: Point
    seed: int
    tried: Mapping[str, float | None]
    at_edge: tuple[str, ...] = ()
    rounds: int | None = None


@dataclass(frozen=True)
class Grid:
    """The values to try, as text, by key."""

    values: Mapping[str, tuple[str, ...]]

    def points(self, variant: str) -> list[Point]:
        """Every combination of the values that ``variant`` has: keys of other methods' settings are left out."""
        method = variant.partition(":")[0]
        own = {
            key: values
            for key, values in self.values.items()
            if not key.startswith("methods.") or key.split(".")[1] == method
        }
        return [tuple(point) for point in itertools.product(*([f"{key}={v}" for v in own[key]] for key in own))]

    def at_edge(self, point: Point) -> tuple[str, ...]:
        """The keys whose value in ``point`` is the lowest or highest of several numbers."""
        keys = []
        for setting in point:
            key, _, value = setting.partition("=")
            numbers = sorted(n for v in self.values[key] if (n := _number(v)) is not None)
            if len(numbers) > 1 and _number(value) in (numbers[0], numbers[-1]):
                keys.append(key)
        return tuple(keys)


def grid_of(texts: Sequence[str]) -> Grid:
    """The grid of ``KEY=v1,v2,...`` for each key. Raises :class:`CoterieError` for other text."""
    values: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, equals, several = text.partition("=")
        key = key.strip()
        listed = tuple(dict.fromkeys(value.strip() for value in several.split(",") if value.strip()))
        if not equals or "." not in key or not listed:
            raise CoterieError(f"--tune {text!r} is not of the form section.key=value1,value2")
        if key.startswith("method."):
            own = key.removeprefix("method.")
            raise CoterieError(f"--tune {text!r}: name the method whose setting it is, as in methods.fedlease.{own}")
        if key.startswith("run.seed"):
            raise CoterieError(f"--tune {text!r}: seeds are not tuned; give --seeds")
        if key in values:
            raise CoterieError(f"--tune {key} is given twice; list all its values after one")
        values[key] = listed
    return Grid(values)


def tune_seed(wanted: int | None, reported: Sequence[int]) -> int:
    """The seed of tuning. Raises :class:`CoterieError` for a reported one: its validation rows would count twice."""
    if wanted is None:
        return next(seed for seed in itertools.count(SEED) if seed not in reported)
    if wanted in reported:
        raise CoterieError(f"--tune-seed {wanted} is also in --seeds; a seed that chose settings is not reported")
    return wanted


def rounds_of_tuning(wanted: int | None, grid: Grid) -> Point:
    """The setting that gives tuning's runs ``wanted`` rounds. Raises :class:`CoterieError` where it has no place."""
    if wanted is None:
        return ()
    if not grid.values:
        raise CoterieError(f"--tune-rounds {wanted} without --tune: there is nothing to tune; leave it out")
    if ROUNDS in grid.values:
        raise CoterieError(f"--tune-rounds {wanted} and --tune {ROUNDS} both set the rounds; leave one out")
    return (f"{ROUNDS}={wanted}",)


def choose(grid: Grid, seed: int, metric: str, tried: Mapping[Point, float | None]) -> Choice | None:
    """The point with the best validation mean, the first of equals; None where all failed."""
    best: tuple[Point, float] | None = None
    for point, value in tried.items():
        if value is not None and (best is None or better(metric, value, best[1])):
            best = point, value
    if best is None:
        return None
    named = {" ".join(point): value for point, value in tried.items()}
    return Choice(best[0], seed, named, grid.at_edge(best[0]))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
