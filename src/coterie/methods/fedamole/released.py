"""What FedAMoLE's clients send."""

from __future__ import annotations

from coterie.methods.fedamole.settings import FedAMoLESettings
from coterie.methods.releases import SERVER, Release, head_release


def released(settings: FedAMoLESettings, shared_heads: bool) -> tuple[Release, ...]:
    """The releases of a client: embeddings only where the experts choose by them."""
    embeddings = Release(
        "mean embeddings of its tokens, by module" + (" and expert" if settings.of_experts else ""),
        reads="each",
        to=SERVER,
        when="every round but the last",
        measured=True,
        mean_of_rows=True,
        last=-1,
        why="experts choose clients by them",
        instead='[method] assignment = "static"',
    )
    return (
        Release("A and B of the experts that it holds", to="the expert's next holders"),
        Release("A and B of the shared expert, the projection"),
        Release("load-balance loss", "info", "nothing", SERVER, names=("balance",)),
        *((embeddings,) if settings.chooses else ()),
        *head_release(shared_heads),
    )
