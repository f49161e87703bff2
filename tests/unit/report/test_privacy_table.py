"""The report says who adds the noise, and whom that protects from."""

from __future__ import annotations

import pytest

from coterie.report.privacy import adds
from coterie.runs.guarantee import Guarantee


@pytest.mark.parametrize(
    ("noise_at", "says"),
    [
        ("server", "the server"),
        ("client", "the client"),
        ("sum", "the clients in parts, before their secure sum: enough if fewer than 20% of its clients work with the "
         "server"),
    ],
)  # fmt: skip
def test_who_adds_the_noise(noise_at: str, says: str) -> None:
    of, neighbours = {"updates": 1}, "one client's"
    made = Guarantee(
        "client", 1.0, 1e-5, "exact", neighbours, 1.0, 0.5, noise_at, "secure", "3 of 3", of, "none", "", 0.2
    )
    assert adds(made) == says
