"""What SmartFed's clients send."""

from __future__ import annotations

from coterie.methods.releases import SERVER, Release, head_release
from coterie.methods.smartfed.settings import SmartFedSettings


def released(settings: SmartFedSettings, shared_heads: bool) -> tuple[Release, ...]:
    """The releases of a client: A and B only of adapters that train."""
    trains = settings.fresh_rank > 0 or bool(settings.train_experts)
    measured = Release(
        "importance by matrix, use by adapter",
        "info",
        "nothing",
        SERVER,
        when=f"every {settings.quota_interval} rounds" if settings.quota_interval > 1 else "every round",
        names=("importance", "use"),
        instead="[policy] upload_usage = false",
    )
    lacking = Release("that it lost the pool", "info", "each", SERVER, "if it did", ("lacks_pool",), of_rows=False)
    budget = Release(
        "its budget of active experts",
        "info",
        "each",
        SERVER,
        "if it has one of its own",
        ("active",),
        "importance grows with the number of active experts",
        of_rows=False,
    )
    return (
        Release("routers"),
        *((Release("A and B of the adapters that train"),) if trains else ()),
        measured,
        lacking,
        budget,
        *head_release(shared_heads),
    )
