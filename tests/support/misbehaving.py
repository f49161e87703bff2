"""`coterie join` of a site that misbehaves by a plan: all of it is real but what its worker does with an answer.

    python tests/support/misbehaving.py PLAN join SITE.toml --insecure

PLAN is JSON. ``{"1": "nan", "3": "late 20"}`` names what happens to the answer of a round of training: a name of
:data:`spoiled.SPOILED`; ``noise``, bytes that are no message; ``late S``, after S seconds; ``never``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from coterie.cli.main import main
from coterie.deploy import site

if __name__ == "__main__":
    plan, here = sys.argv.pop(1), str(Path(__file__).parent)
    site._WORKER = (  # what `coterie join` starts as its worker
        f"import sys; sys.path.insert(0, {here!r}); from misbehaving_worker import work; "
        f"work(sys.argv[1], sys.argv[2], {plan!r})"
    )
    main()
