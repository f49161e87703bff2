"""Hides what bitsandbytes logs on every run and no user can act on. Its other warnings stay."""

from __future__ import annotations

import logging

# The logger, and how the message starts. The first comes with the import, on processors with bfloat16 products: it
# is about a kernel that nothing here uses. The second comes with every product of an 8-bit weight.
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
}


def quiet_bitsandbytes() -> None:
    """Call this before bitsandbytes is imported, also by a library that imports it. Again is no harm."""
    for name in _NOISE:
        logging.getLogger(name).addFilter(_of_use)


def _of_use(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_NOISE[record.name])
