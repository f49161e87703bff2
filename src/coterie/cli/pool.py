"""The command line for pools: ``coterie pool build`` and ``coterie pool show``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli import console
from coterie.cli.plain import one_line
from coterie.units import size

if TYPE_CHECKING:
    from coterie.adapters.pool import Adapter

app = typer.Typer(no_args_is_help=True, help="Pools of existing LoRA adapters, for SmartFed.")


@app.command()
def build(
    folder: Annotated[Path, typer.Argument(help="the folder to write the pool to")],
    more: Annotated[list[str] | None, typer.Argument(help="more adapter folders", metavar="[A B C ...]")] = None,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapters", help="PEFT adapter folders, FOLDER or NAME=FOLDER, one or more")
    ] = None,
    run: Annotated[
        list[Path] | None, typer.Option("--run", help="a finished run, whose experts go into the pool; may be repeated")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="the base model, a folder or a hub name; by default the one the adapters name")
    ] = None,
) -> None:
    """Check PEFT adapter folders, or the experts of runs, against their base, and build a pool from them."""
    from coterie.adapters.pool import write_pool
    from coterie.adapters.read import build_pool, experts_of

    runs = run or []
    of_runs = [source for each in runs for source in experts_of(each, named=len(runs) > 1)]
    pool = build_pool([*(adapters or ()), *(more or ()), *of_runs], base)
    write_pool(folder, pool)
    show(folder)
    for adapter in pool.adapters:
        if base and adapter.base not in ("", base, pool.base):
            console.prose(
                f"note: {adapter.name} names the base {adapter.base}; make sure that it was trained on {pool.base}"
            )


@app.command()
def show(folder: Annotated[Path, typer.Argument(help="a pool's folder")]) -> None:
    """Show what is in a pool, and where it came from."""
    from coterie.adapters.pool import norms, out_of_line, read_pool, total

    pool = read_pool(folder)
    of_pool = norms(pool)
    console.show_aligned(
        ("adapter", "rank", "experts", "norm", "matrices"),
        [
            (
                adapter.name,
                _span(adapter.ranks.values()),
                _span(adapter.experts),
                f"{total(of_pool[adapter.name]):.3g}",
                str(len(adapter.ranks)),
            )
            for adapter in pool.adapters
        ],
    )
    for adapter in pool.adapters:
        console.say(_origin(adapter))
    stored = size(sum(value.nbytes for value in pool.tensors.values()))
    experts = _span((pool.size(module) for module in pool.modules), " to ")
    console.say(f"\npool {pool.name}\n{one_line(f'base {pool.base}')}")
    console.prose(f"a run checks the base's weights on {len(pool.weights)} of {len(pool.modules)} matrices")
    console.prose(
        f"{len(pool.modules)} matrices with {experts} experts of rank 1 each; {stored}, sent to a client once"
    )
    for name, excess in out_of_line(of_pool).items():
        console.prose(
            f"note: {name} is out of line: {excess}. By default a run leaves it out ([method] pool_bound): check where "
            "it comes from, or build the pool without it"
        )


def _origin(adapter: Adapter) -> str:
    """Where an adapter came from, a line for each fact: paths stay whole on a narrow terminal."""
    lines = [
        adapter.name,
        f"  licence   {adapter.licence or 'not given'}",
        f"  base      {adapter.base or 'not given'}",
        f"  source    {adapter.source}",
        f"  sha256    {adapter.sha256[:12]}",
    ]
    lines += [f"  left out  {', '.join(adapter.left_out)}"] if adapter.left_out else []
    return "\n" + "\n".join(map(one_line, lines))


def _span(numbers: Iterable[int], to: str = "-") -> str:
    """The smallest and the largest number, or the only one."""
    values = list(numbers)
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}{to}{high}"
