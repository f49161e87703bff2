"""FedAMoLE's reverse selection (arXiv 2411.19128): experts pick their clients, module by module, for the largest sum.

Arrays only. m is the number of modules, E that of a module's experts, N that of clients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.optimize import linprog

from coterie.types import CoterieError

Array = NDArray[np.float64]

# By default, HiGHS treats a reduced cost below 1e-7 as zero. With peaked scores, the sum then misses its optimum by up
# to 1e-5, and equal scores can take twenty times the steps. 1e-10 is the least it allows; scaling the gains makes that
# 1e-13.
_TOLERANCE = 1e-10
_SCALE = 1e3
_INTEGRAL = 1e-6
# HiGHS releases the interpreter's lock, but scipy reads the result column by column while holding it. So two threads
# are 1.3 to 1.9 times as fast at 300 x 100, and no faster below. Each also starts HiGHS's own threads, one for every
# two cores.
_WORTH_THREADS = 20_000
_MOST_THREADS = 4
_SEARCH = 100_000  # how far from an infeasible number to search for a feasible one


@dataclass(frozen=True)
class Limits:
    """How many clients an expert picks, and how many of a module's experts a client gets (homogeneous: all alike)."""

    clients_per_expert: int
    min_experts: int
    max_experts: int
    homogeneous: bool = False
    least_is: str = "min_experts"  # the setting that ``min_experts`` comes from, for messages


def check(num_experts: int, num_clients: int, limits: Limits) -> None:
    """Raise :class:`CoterieError` if no assignment meets ``limits``; it says which number to change, and to what.

    An assignment exists if and only if an expert has enough clients to pick from and E * clients_per_expert lies
    between N * min_experts and N * max_experts (homogeneous: and N divides it): :func:`_in_turn` makes one.
    """
    if fault := _fault(num_experts, num_clients, limits):
        fixes = ", or ".join(_fixes(num_experts, num_clients, limits))
        raise CoterieError(f"{fault}: {fixes or 'change more than one of these numbers'}")


def assign(
    affinity: ArrayLike, limits: Limits, *, picks: ArrayLike | None = None, threads: int | None = None
) -> NDArray[np.bool_]:
    """z = argmax sum(affinity * z) for each module, within ``limits``; affinity and z [m, E, N].

    z in {0, 1}, every row sums to ``clients_per_expert``, every column to ``min_experts`` .. ``max_experts``. With
    ``picks`` [m, E] every row has a sum of its own, and the bounds of the columns give way where they must.

    The matrix of these sums is the incidence matrix of a bipartite graph, so it is totally unimodular: every vertex of
    the relaxed problem is integral, and the simplex method returns a vertex. Among equal optima it is always the same,
    whatever the number of ``threads`` (by default the cores, 4 at most, where there is enough to do).
    Raises as :func:`check` does; :class:`ValueError` for an affinity of another shape or that is not finite, or for
    ``picks`` of more clients than there are;
    :class:`RuntimeError` where what HiGHS returned is no assignment within ``limits``.
    """
    scores = np.asarray(affinity, dtype=np.float64)
    if scores.ndim != 3 or not scores.size:
        raise ValueError(f"affinity of shape {list(scores.shape)}; expected [modules, experts, clients]")
    with np.errstate(all="ignore"):
        if not np.isfinite(scores.max() - scores.min()):  # one check for nan, infinities and what overflows below
            raise ValueError("affinity is not finite")
    modules, experts, clients = scores.shape
    if picks is None:
        check(experts, clients, limits)
        rows = np.full((modules, experts), limits.clients_per_expert)
    else:
        rows = np.asarray(picks)
        if rows.shape != (modules, experts) or rows.min() < 0 or rows.max() > clients:
            raise ValueError(f"picks of shape {list(rows.shape)}; expected 0 to {clients} for [modules, experts]")
    if threads is None:
        threads = min(_cores(), _MOST_THREADS) if experts * clients >= _WORTH_THREADS else 1
    solve = partial(_assign_one, limits=limits, sums=_sums(experts, clients))
    with ThreadPoolExecutor(min(threads, modules)) as pool:  # also for one: with it HiGHS's helpers end
        return np.stack(list(pool.map(solve, scores, rows)))


def _assign_one(scores: Array, picks: NDArray[np.int_], limits: Limits, sums: Any) -> NDArray[np.bool_]:
    """z [E, N] of one module, of which expert e picks ``picks[e]`` clients."""
    experts, clients = scores.shape
    # Subtracting a number from a whole row changes nothing, because the number of picks in a row is fixed. With this
    # number, HiGHS starts from what each expert would pick alone and fixes the columns: 1.4 to 1.8 times as fast.
    ranked = np.sort(scores, axis=1)[:, ::-1]
    every = np.arange(experts)
    gain = scores - (ranked[every, picks - 1] / 2 + ranked[every, np.minimum(picks, clients - 1)] / 2)[:, None]
    gain[picks == 0] = 0
    largest = np.abs(gain).max()
    if largest == 0:  # all scores are equal: every assignment is optimal, and HiGHS is slow to find one
        return _in_turn(picks, clients)
    least, most = _bounds(int(picks.sum()), clients, limits)
    bounds: Any = np.repeat([[0.0, 1.0], [least, most]], [scores.size, clients], axis=0)
    solution = linprog(
        np.concatenate([(-_SCALE * (gain / largest)).ravel(), np.zeros(clients)]),
        A_eq=sums,
        b_eq=np.concatenate([picks.astype(np.float64), np.zeros(clients)]),
        bounds=bounds,
        method="highs-ds",  # the dual simplex method, which ends on a corner
        options={"presolve": False, "dual_feasibility_tolerance": _TOLERANCE},
    )
    if solution.x is None or not solution.success:
        raise RuntimeError(f"HiGHS found no assignment of {experts} experts to {clients} clients: {solution.message}")
    share = solution.x[: scores.size].reshape(experts, clients)
    z: NDArray[np.bool_] = share > 0.5
    counts = z.sum(axis=0)
    within = (z.sum(axis=1) == picks).all() and (counts >= least).all() and (counts <= most).all()
    if np.abs(share - z).max() > _INTEGRAL or not within:
        raise RuntimeError(f"HiGHS's assignment of {experts} experts to {clients} clients is not whole or not {limits}")
    return z


def _sums(experts: int, clients: int) -> sparse.csc_array:
    """[E + N, E * N + N]: each row of z sums to its picks, each column to a variable, the number of its experts."""
    rows = sparse.kron(sparse.eye_array(experts), np.ones((1, clients)))
    columns = sparse.kron(np.ones((1, experts)), sparse.eye_array(clients))
    blocks: Any = [[rows, None], [columns, -sparse.eye_array(clients)]]
    return sparse.csc_array(sparse.block_array(blocks))


def _bounds(picked: int, clients: int, limits: Limits) -> tuple[int, int]:
    """The fewest and the most experts of a client, where all of them are ``picked``: wide enough for an equal share."""
    least, most = picked // clients, -(-picked // clients)
    if limits.homogeneous:
        return least, most
    return min(limits.min_experts, least), max(limits.max_experts, most)


def _in_turn(picks: NDArray[np.int_], clients: int) -> NDArray[np.bool_]:
    """Expert after expert picks the clients whose turn it is: all get the same number, or one more."""
    z = np.zeros((len(picks), clients), dtype=np.bool_)
    z[np.repeat(np.arange(len(picks)), picks), np.arange(picks.sum()) % clients] = True
    return z


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# what cannot be met, and what to change ------------------------------------------------------------------------------


def _fault(experts: int, clients: int, limits: Limits) -> str | None:
    """Why no assignment meets ``limits``, None where one does."""
    picks, least, most = limits.clients_per_expert, limits.min_experts, limits.max_experts
    for name, number, floor in (
        ("the number of experts", experts, 1),
        ("the number of clients", clients, 1),
        ("clients_per_expert", picks, 1),
        (limits.least_is, least, 0),
    ):
        if number < floor:
            return f"{name} is {number}"
    picked = experts * picks
    pool = f"{experts} experts with clients_per_expert = {picks}"
    if least > most:
        return f"{limits.least_is} = {least} is above max_experts = {most}"
    if picks > clients:
        return f"clients_per_expert = {picks}, but there are {clients} clients to pick from"
    if limits.homogeneous and picked % clients:
        return f"homogeneous, but {pool} make {picked} picks in a module, which {clients} clients cannot share evenly"
    if picked > clients * most:
        return f"max_experts = {most} lets {clients} clients take {clients * most} picks, but {pool} make {picked}"
    if picked < clients * least:
        wanted = f"{limits.least_is} = {least} needs {clients * least} picks"
        return f"{wanted} for {clients} clients, but {pool} make {picked}"
    return None


def _fixes(experts: int, clients: int, limits: Limits) -> Iterator[str]:
    """Each change of one number, by as little as possible, with which an assignment exists."""
    picked, evenly = experts * limits.clients_per_expert, limits.homogeneous
    changes: list[tuple[str, int, int, Callable[[int], str | None]]] = [
        (
            "max_experts",
            limits.max_experts,
            experts,
            lambda n: _fault(experts, clients, replace(limits, max_experts=n)),
        ),
        (
            limits.least_is,
            limits.min_experts,
            experts,
            lambda n: _fault(experts, clients, replace(limits, min_experts=n)),
        ),
        (
            "the experts",
            experts,
            clients * max(limits.min_experts + 1, limits.max_experts),
            lambda n: _fault(n, clients, limits),
        ),
        (
            "clients_per_expert",
            limits.clients_per_expert,
            clients,
            lambda n: _fault(experts, clients, replace(limits, clients_per_expert=n)),
        ),
        ("the clients", clients, max(picked, limits.clients_per_expert), lambda n: _fault(experts, n, limits)),
    ]
    for name, now, top, fault in changes:
        more = range(now + 1, min(top, now + _SEARCH) + 1)
        fewer = range(min(now - 1, top), max(0, min(now - 1, top) - _SEARCH), -1)
        if (up := next((n for n in more if fault(n) is None), None)) is not None:
            yield f"raise {name} to {'' if evenly else 'at least '}{up}"
        if (down := next((n for n in fewer if fault(n) is None), None)) is not None:
            yield f"lower {name} to {'' if evenly else 'at most '}{down}"
    if evenly and _fault(experts, clients, replace(limits, homogeneous=False)) is None:
        yield "let clients hold different numbers of experts"
