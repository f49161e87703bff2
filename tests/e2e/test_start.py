"""What a run imports: it begins without what only its end or other runs need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import sites

UNUSED = {"peft", "bitsandbytes", "sklearn", "datasets", "flwr", "ray", "typer", "pandas"}
AT_THE_END = {"matplotlib"}
PROGRAM = """
import json, sys
from pathlib import Path

from coterie.config.load import load_config
from coterie.experiment import run

modules = {}

def listen(event):
    modules.setdefault(type(event).__name__, sorted(name for name in sys.modules if "." not in name))

path = Path(sys.argv[1])
run(load_config(path), path.parent / "out", root=path.parent, listen=listen)
modules["end"] = sorted(name for name in sys.modules if "." not in name)
print(json.dumps(modules))
"""


def test_a_run_imports_what_it_uses(tmp_path: Path) -> None:
    path = sites.config(tmp_path, method="fedlease", rows=4, others=2)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True)
    modules = {event: set(names) for event, names in json.loads(done.stdout.splitlines()[-1]).items()}
    assert {"torch", "transformers", "pyarrow"} <= modules["Ready"]
    assert (UNUSED | AT_THE_END) & modules["Ready"] == set()
    assert modules["end"] >= AT_THE_END
    assert UNUSED & modules["end"] == set()
