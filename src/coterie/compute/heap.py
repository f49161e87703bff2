"""What this machine's allocator takes for a sequence of blocks, which is more than the blocks themselves.

glibc reuses a gap only for what fits into it, and returns memory from the end of its heap alone: as blocks of other
sizes come and go, gaps stay between those that live. The blocks are allocated and freed in a process of its own, by the
same function as torch's, and never written: that takes address space and time for a few thousand calls, no memory.

The process runs this file alone, so it imports nothing that is not Python's.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

Block = tuple[int, int]  # a block's number and its bytes; 0 bytes: it is freed
_ALIGNED = 64  # as torch aligns
_PAGE = 4096
_SMALL = 1040  # bytes up to which glibc caches freed blocks
_LARGEST = 32 * 2**20  # glibc gives larger blocks a mapping of their own, whatever it has seen


def gaps(traces: Sequence[Sequence[Block]]) -> int:
    """The most bytes that the allocator holds beyond the most that live, for traces that begin one after another.

    What a trace leaves is freed at its end. 0 where the allocator is not glibc's.
    """
    if platform.libc_ver()[0] != "glibc":
        return 0
    blocks = list(_whole(traces))
    lines = "\n".join(f"{number} {size}" for number, size in blocks)
    done = subprocess.run(
        [sys.executable, "-I", __file__], input=lines, capture_output=True, text=True, check=False, timeout=60
    )
    held = int(done.stdout) if done.returncode == 0 else 0  # too little address space: nothing is known
    return max(0, held - most_alive(blocks))


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
