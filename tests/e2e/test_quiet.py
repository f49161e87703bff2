"""What Python prints: nothing of libraries below, neither from a run nor from what is made of it."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

import sites
import tiny
from coterie.adapters.write import write_adapter
from coterie.nn.quiet import quiet_bitsandbytes

RUN = """
import sys
from pathlib import Path

import coterie

path = Path(sys.argv[1])
coterie.run(path, path.parent / "out")
model = coterie.load(path.parent / "out", "mood-0")
model.model(**model.tokenizer(["one two"], return_tensors="pt"))
"""
POOL = """
from coterie.adapters.read import build_pool

build_pool(sys.argv[2:])
"""


def printed(program: str, *arguments: Path) -> str:
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("quantize", ["none", "nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_run_what_is_loaded_from_it_and_a_pool_print_nothing(quantize: str, tmp_path: Path) -> None:
    path = sites.config(tmp_path, "llama", kind="classification", method="fedit", rows=4, others=2)
    tiny.folder(
        tmp_path / "model", "llama", hidden_size=64, intermediate_size=128
    )  # 4-bit weights come in blocks of 64
    text = path.read_text("utf-8").replace("rounds = 3", "rounds = 1")
    path.write_text(text.replace("[model]", f'[model]\nquantize = "{quantize}"'), encoding="utf-8")
    assert printed(RUN + POOL, path, adapter(tmp_path)) == ""


def adapter(folder: Path) -> Path:
    """An adapter of a base of its own, to build a pool of."""
    base = tiny.folder(folder / "pool-model", "llama")
    bank = tiny.bank(tiny.targets(tiny.model("llama", "generation")))
    tensors = {key._replace(expert=0): value for key, value in bank.tensors.items()}
    write_adapter(folder / "one", tensors, rank=4, alpha=8, about=tiny.about(base=str(base), task="generation"))
    return folder / "one"


def test_other_warnings_of_bitsandbytes_stay(caplog: pytest.LogCaptureFixture) -> None:
    quiet_bitsandbytes()
    quiet_bitsandbytes()
    kernels, products = (
        logging.getLogger(f"bitsandbytes.{name}") for name in ("backends.cpu.ops", "autograd._functions")
    )
    with caplog.at_level(logging.WARNING):
        kernels.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "why")
        products.warning("MatMul8bitLt: inputs will be cast from %s to float16 during quantization", "x")
        kernels.warning("no library for %s", "this processor")
        products.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["no library for this processor", "something else"]
    assert len(kernels.filters) == 1
