"""The ClientApp: what it answers when the worker does not."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from coterie.flower import app
from coterie.flower.local_socket import listening, receive
from coterie.flower.message import Message


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("door")
    folder.chmod(0o700)
    return folder / "worker"


def test_a_message_that_kills_the_worker_is_handed_over_three_times(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = []

    def dies() -> None:
        with listening(path) as listener:
            while True:
                link, _ = listener.accept()
                with link:
                    handed.append(receive(link))

    threading.Thread(target=dies, daemon=True).start()
    while not path.exists():
        pass
    monkeypatch.setattr(app, "_WORKER_PAUSE", 0.0)
    context = Context(1, 11, {"socket": str(path)}, RecordDict(), {})
    answer = app.answer_of_worker(Message({"patience": 60}, b"poison"), context, 60.0)
    assert answer.head["error"] == "the site's worker died while handling this message; see site.log there"
    assert len(handed) == 3
