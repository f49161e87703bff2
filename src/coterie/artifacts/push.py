"""``coterie push``: an export with its model card as a repository of the hub, or of a server with its API."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from coterie.artifacts.card import check_card
from coterie.nn.locate import HTTP_FAULTS
from coterie.types import CoterieError

_HIDDEN = [".*", "**/.*"]


def push(folder: Path | str, repo: str, *, public: bool = False, message: str = "") -> str:
    """Upload what :func:`coterie.artifacts.export.export` wrote to ``folder`` to ``repo`` (OWNER/NAME); its address.

    A repository that is not there is made: private, unless ``public``. One that is there keeps its visibility. The
    token is the one of ``hf auth login``, or ``HF_TOKEN``; ``HF_ENDPOINT`` names another server with the hub's API.
    Raises :class:`CoterieError` for a folder without a model card, a bad name, a server that does not answer, and what
    it refuses.
    """
    path = Path(folder)
    check_card(path)
    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=path,
            commit_message=message or f"Upload {path.resolve().name}",
            ignore_patterns=_HIDDEN,
        )
    except HFValidationError as fault:
        raise CoterieError(f"{repo!r} is no name of a repository; give OWNER/NAME ({fault})") from fault
    except HfHubHTTPError as fault:
        fix = "check the name, and log in with `hf auth login`"
        raise CoterieError(f"the hub refuses {repo}: {_reason(fault)}; {fix}") from fault
    except OfflineModeIsEnabled as fault:
        raise CoterieError("HF_HUB_OFFLINE is set, so nothing is sent to the hub; unset it to push") from fault
    except HTTP_FAULTS as fault:  # after OfflineModeIsEnabled and HfHubHTTPError, which derive from these
        fix = "check the network, and HF_ENDPOINT if you set it"
        raise CoterieError(f"{constants.ENDPOINT} does not answer: {_reason(fault)}; {fix}") from fault
    return str(done.repo_url)


def _reason(fault: Exception) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]
