"""What an allocator takes for blocks that come and go."""

from __future__ import annotations

import platform
import subprocess

import pytest
import torch

from coterie.compute.footprint import LiveBytes
from coterie.compute.heap import Trace, _gaps, _with_small, gaps, most_alive

MIB = 2**20
GLIBC = platform.libc_ver()[0] == "glibc"


def test_what_lives_at_once_is_counted() -> None:
    assert most_alive([(0, 5), (1, 7), (0, 0), (2, 4), (2, 0), (1, 0)]) == 12
    assert most_alive([]) == 0


@pytest.mark.skipif(not GLIBC, reason="the allocator is not glibc's")
def test_a_larger_block_does_not_fit_into_a_gap() -> None:
    first, wall, larger = (0, 10 * MIB), (1, MIB), (2, 12 * MIB)
    found = gaps([Trace([first, wall, (0, 0), larger])])
    assert 9 * MIB < found < 11 * MIB, "the first one's"
    assert gaps([Trace([first, wall, (0, 0), (2, 9 * MIB)])]) < MIB, "a smaller one fits"
    assert gaps([Trace([(0, 40 * MIB), wall, (0, 0), (2, 50 * MIB)])]) < MIB, "large ones have mappings of their own"


@pytest.mark.skipif(not GLIBC, reason="the allocator is not glibc's")
def test_a_trace_ends_with_what_it_left_freed() -> None:
    trace = Trace([(0, 8 * MIB), (1, 8 * MIB)])
    assert gaps([trace, trace, trace]) < MIB
    assert gaps([]) == 0


def test_small_blocks_live_with_their_tensor_and_in_the_graph_until_its_turn() -> None:
    """Numbers from 2 on are small blocks: two of each tensor and, of those in the forward pass, one of the graph."""
    blocks = [(0, 10), (1, 20), (0, 0), (1, 0)]
    forward_of_two = Trace([*blocks, (2, 30), (2, 0)], begins=4, ends=6)
    found = [*_with_small(forward_of_two, (5, 6), 7)]
    assert found == [
        *[(0, 10), (3, 5), (4, 6), (5, 7)],
        *[(1, 20), (6, 5), (7, 6), (8, 7)],
        *[(0, 0), (3, 0), (4, 0)],
        *[(1, 0), (6, 0), (7, 0)],
        *[(2, 30), (9, 5), (10, 6), (8, 0)],
        *[(2, 0), (9, 0), (10, 0), (5, 0)],
    ]
    assert len([*_with_small(Trace(blocks), (5, 6), 7)]) == 4 + 2 * 2 * 2, "a pass without gradients has no graph"


def test_without_glibc_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert gaps([Trace([(0, 10 * MIB), (1, MIB), (0, 0), (2, 12 * MIB)])]) == 0


@pytest.mark.parametrize(
    ("fates", "expected"),
    [
        ([170, 10, 20, 30, 40, 50, 60], 40),
        (["fails", 10, 20, "fails", 30, 40, 50], 30),  # none counts as 0
        ([10, 20, 30, "late", "late", "late", "late"], 20),
        ([10, 20, "fails", "fails", "fails", "fails", "late"], 15),
        (["late"] * 7, 0),
    ],
)
def test_a_layout_of_which_nothing_is_known_is_left_out(
    fates: list[int | str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(fates)

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        fate, lines = next(left), str(options["input"]).splitlines()
        if fate == "late":
            raise subprocess.TimeoutExpired(command, 1.0)
        if fate == "fails":
            raise subprocess.CalledProcessError(1, command)
        live = most_alive([(int(number), int(size)) for number, size in map(str.split, lines)])
        return subprocess.CompletedProcess(command, 0, stdout=f"{live + int(fate)}\n")

    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(subprocess, "run", run)
    assert gaps([Trace([(0, MIB), (0, 0)])]) == expected


@pytest.mark.skipif(not GLIBC, reason="the allocator is not glibc's")
@pytest.mark.parametrize(("blocks", "seconds"), [([(0, -1)], 60.0), ([(0, MIB)], 0.0)])
def test_a_process_that_fails_or_is_late_tells_nothing(blocks: list[tuple[int, int]], seconds: float) -> None:
    assert _gaps(blocks, seconds) is None


def test_views_of_the_base_are_no_storages_of_the_pass() -> None:
    base = torch.nn.Linear(30, 20)
    for frozen, made in ((base, 80), (None, 80 + 30 * 20 * 4)):
        with torch.no_grad(), LiveBytes(frozen) as live:
            base.weight.t().sum(dim=0)
        assert live.made == made


def test_tensors_are_followed_from_their_first_operation_to_their_end() -> None:
    with LiveBytes() as live:
        kept = torch.ones(100)
        for _ in range(3):
            kept = kept + 1
        kept.view(10, 10)
    sizes = [size for _, size in live.blocks]
    assert sizes.count(400) == 4
    assert sizes.count(0) == 3
    assert most_alive(live.blocks) == live.peak
