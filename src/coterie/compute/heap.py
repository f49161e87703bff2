"""What this machine's allocator takes for a sequence of blocks, which is more than the blocks themselves.

glibc reuses a gap only for what fits into it, and returns memory from the end of its heap alone: as blocks of other
sizes come and go, gaps stay between those that live. What keeps them apart are small blocks: those that describe a
tensor beside its data, and those of the graph of gradients, which holds every operation of the forward pass until its
turn in the backward pass, also where gradient checkpointing drops the data. The blocks are allocated and freed in a
process of its own, by the same functions as torch's, and never written: that takes address space and time for some ten
thousand calls, no memory.

The process runs this file alone, so it imports nothing that is not Python's.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

Block = tuple[int, int]  # a block's number and its bytes; 0 bytes: it is freed
_ALIGNED = 64  # as torch aligns
_PAGE = 4096
_SMALL = 1040  # bytes up to which glibc caches freed blocks
# The bytes of the small blocks that describe a tensor, and of the one of an operation in the graph of gradients.
_SMALL_BLOCKS = (
    ((24, 56, 96), 64),
    ((24, 96), 64),
    ((24, 56), 64),
    ((24, 56, 96), 80),
    ((16, 56, 96), 80),
    ((24, 56, 88), 64),
    ((56, 96), 64),
)
_MALLOC = 96  # bytes up to which a block is not aligned
_SECONDS = 60.0  # for all layouts of one call; each usually takes far less than one
_LARGEST = 32 * 2**20  # glibc gives larger blocks a mapping of their own, whatever it has seen


@dataclass(frozen=True)
class Trace:
    """The blocks of a pass as they come and go; its backward pass is ``blocks[begins:ends]``."""

    blocks: Sequence[Block]
    begins: int = 0
    ends: int = 0


def gaps(traces: Sequence[Trace]) -> int:
    """The most bytes that the allocator holds beyond the most that live, for traces that begin one after another.

    What a trace leaves is freed at its end. 0 where the allocator is not glibc's.
    Tensors differ in their small blocks, and where those fall is chance: this is the mean over seven layouts of them,
    without the most and the least. Layouts of which nothing is known are left out: those whose process fails, and those
    for which time runs out. 0 where that is all of them.
    """
    if platform.libc_ver()[0] != "glibc":
        return 0
    layouts = [_whole([[*_with_small(trace, *small)] for trace in traces]) for small in _SMALL_BLOCKS]
    end = time.monotonic() + _SECONDS
    found = sorted(gap for blocks in layouts if (gap := _gaps([*blocks], end - time.monotonic())) is not None)
    middle = found[1:-1] or found
    return sum(middle) // max(1, len(middle))


def _gaps(blocks: Sequence[Block], seconds: float) -> int | None:
    """What a process of its own holds for ``blocks`` beyond the most that live. None: it failed or took too long."""
    lines = "\n".join(f"{number} {size}" for number, size in blocks)
    command = [sys.executable, "-I", __file__]
    try:
        done = subprocess.run(
            command, input=lines, capture_output=True, text=True, check=True, timeout=max(0.0, seconds)
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):  # for one, too little address space
        return None
    return max(0, int(done.stdout) - most_alive(blocks))


def most_alive(blocks: Iterable[Block]) -> int:
    """The most bytes that live at once."""
    sizes: dict[int, int] = {}
    now = most = 0
    for number, size in blocks:
        now += size - sizes.pop(number, 0)
        if size:
            sizes[number] = size
        most = max(most, now)
    return most


def _with_small(trace: Trace, tensor: Sequence[int], node: int) -> Iterator[Block]:
    """The blocks of a trace, each with small ones: of its ``tensor``, and a ``node`` of the graph of gradients."""
    number = 1 + max((each for each, _ in trace.blocks), default=0)
    beside: dict[int, range] = {}
    nodes: list[tuple[float, int]] = []  # when each goes, and its number; the last to come is the first to go
    for at, (block, size) in enumerate(trace.blocks, start=1):
        yield block, size
        if not size:
            yield from ((each, 0) for each in beside.pop(block, ()))
        else:
            beside[block] = range(number, number + len(tensor))
            yield from zip(beside[block], tensor, strict=True)
            number += len(tensor)
            if at < trace.begins:
                nodes.append((trace.ends - at / trace.begins * (trace.ends - trace.begins), number))
                yield number, node
                number += 1
        while nodes and nodes[-1][0] <= at:
            yield nodes.pop()[1], 0


def _whole(traces: Sequence[Sequence[Block]]) -> Iterator[Block]:
    """The traces as one, with numbers of its own for each block."""
    first = 0
    for trace in traces:
        alive: set[int] = set()
        for number, size in trace:
            (alive.add if size else alive.discard)(number)
            yield first + number, size
        yield from ((first + number, 0) for number in sorted(alive))
        first += 1 + max((number for number, _ in trace), default=0)


def held(blocks: Sequence[Block]) -> int:
    """The most bytes that this process's heap and mappings take for ``blocks``.

    It has freed a large block before, as a process has that trains: mappings are then for larger ones alone. And small
    ones, so that the cache of those is full, and what is left beside an aligned block can join the next gap.
    """
    libc, at = ctypes.CDLL(None), ctypes.c_void_p()
    libc.sbrk.restype, libc.sbrk.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t], [ctypes.c_void_p]
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]

    def allocated(size: int) -> int:
        if size <= _MALLOC:
            return int(libc.malloc(size))
        if libc.posix_memalign(ctypes.byref(at), _ALIGNED, size):
            raise MemoryError(size)
        return int(at.value or 0)

    count = 1 + max((number for number, _ in blocks), default=0)
    addresses, owns = [0] * count, [0] * count  # owns: bytes of a mapping of its own, above the heap
    small = [libc.malloc(size) for size in range(16, _SMALL, 16) for _ in range(8)]
    for address in [*small, allocated(_LARGEST - 2**20)]:
        libc.free(address)
    libc.malloc_trim(0)
    start, mapped, most = int(libc.sbrk(0)), 0, 0
    for number, size in blocks:
        if size:
            addresses[number] = allocated(size)
            owns[number] = 0 if addresses[number] < libc.sbrk(0) else -(-size // _PAGE) * _PAGE
            mapped += owns[number]
        else:
            libc.free(addresses[number])
            mapped -= owns[number]
        most = max(most, libc.sbrk(0) - start + mapped)
    return most


if __name__ == "__main__":
    print(held([(int(number), int(size)) for number, size in map(str.split, sys.stdin)]))
