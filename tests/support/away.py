"""`coterie join` of a site whose worker hangs at one step of a secure sum, until somebody kills the site.

    python tests/support/away.py STEP join SITE.toml

The file ``STEP`` in the site's state folder says that it has come so far.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from coterie.cli.main import main
from coterie.deploy import site, worker, worker_process
from coterie.flower.message import Message


def work(path: str, door: str, step: str) -> None:
    class Hanging(worker.Worker):
        def answer(self, message: Message) -> Message:
            if message.head.get("step") == step:
                (self.state / step).touch()
                time.sleep(3600)
            return super().answer(message)

    worker_process.Worker = Hanging  # type: ignore[misc]
    worker_process.work(path, door)


if __name__ == "__main__":
    step, here = sys.argv.pop(1), str(Path(__file__).parent)
    site._WORKER = (
        f"import sys; sys.path.insert(0, {here!r}); from away import work; work(sys.argv[1], sys.argv[2], {step!r})"
    )
    main()
