"""The command line for pools: ``coterie pool build`` and ``coterie pool show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from coterie.cli import console
from coterie.cli.plain import escape
from coterie.units import size

app = typer.Typer(no_args_is_help=True, help="Pools of existing LoRA adapters, for SmartFed.")


@app.command()
def build(
    folder: Annotated[Path, typer.Argument(help="the folder to write the pool to")],
    more: Annotated[list[str] | None, typer.Argument(help="more adapter folders", metavar="[A B C ...]")] = None,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapters", help="PEFT adapter folders, FOLDER or NAME=FOLDER, one or more")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="the base model, a folder or a hub name; by default the one the adapters name")
    ] = None,
) -> None:
    """Check PEFT adapter folders against their base, and build a pool from them."""
    from coterie.adapters.pool import write_pool
    from coterie.adapters.read import build_pool

    pool = build_pool([*(adapters or ()), *(more or ())], base)
    write_pool(folder, pool)
    show(folder)
    for adapter in pool.adapters:
        if base and adapter.base not in ("", base, pool.base):
            text = f"note: {adapter.name} names the base {adapter.base}; make sure that it was trained on {pool.base}"
            console.out.print(escape(text), highlight=False, soft_wrap=True)


@app.command()
def show(folder: Annotated[Path, typer.Argument(help="a pool's folder")]) -> None:
    """Show what is in a pool, and where it came from."""
    from coterie.adapters.pool import norms, out_of_line, read_pool

    pool = read_pool(folder)
    of_pool = norms(pool)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("adapter", "rank", "experts", "norm", "matrices", "licence", "base", "source", "sha256", "left out"):
        table.add_column(column, overflow="fold", no_wrap=column == "adapter")
    for adapter in pool.adapters:
        ranks = sorted(set(adapter.ranks.values()))
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        numbers = f"{adapter.experts.start}-{adapter.experts.stop - 1}"
        cells = [
            adapter.name,
            rank,
            numbers,
            f"{of_pool[adapter.name]:.3g}",
            str(len(adapter.ranks)),
            adapter.licence or "not given",
            adapter.base,
        ]
        cells += [adapter.source, adapter.sha256[:12], ", ".join(adapter.left_out) or "-"]
        table.add_row(*map(escape, cells))
    console.out.print(table)
    sizes = sorted({pool.size(module) for module in pool.modules})
    rank_one = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    total = size(sum(value.nbytes for value in pool.tensors.values()))
    lines = [
        f"pool {pool.name}",
        f"base {pool.base}",
        f"a run checks the base's weights on {len(pool.weights)} of {len(pool.modules)} matrices",
        f"{len(pool.modules)} matrices with {rank_one} experts of rank 1 each; {total}, sent to a client once",
    ]
    lines += [
        f"note: {name} is out of line: its norm (of B A, over its matrices) is {times:.3g} times the others' median. "
        "Routing cannot make up for that: check where it comes from, or build the pool without it"
        for name, times in out_of_line(of_pool).items()
    ]
    console.out.print("\n".join(map(escape, lines)), highlight=False, soft_wrap=True)
