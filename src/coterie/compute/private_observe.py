"""Mean embeddings that hide every row (``[privacy] unit = "example"``): each row's are cut, and their sum gets noise.

A row's embeddings, all those that are requested together, are one vector: the means over the row's own tokens, whatever
the other rows. It is cut to ``embedding_clip``. The sum over all rows gets Gaussian noise, and is divided by their
number, which is no secret.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from coterie.compute.observe import Observation
from coterie.compute.passes import evaluating, on_base
from coterie.compute.score import in_order
from coterie.methods.row_privacy import RowPrivacy
from coterie.requests import Observe, Observed
from coterie.types import CoterieError, Key, Tensors

_WHAT = ("embeddings",)


def hides(request: Observe) -> bool:
    """Whether the request is for mean embeddings over all training rows, which :func:`private_embeddings` can hide."""
    whole = not (request.hold_out or request.padding or request.examples)
    return request.split == "train" and request.what == _WHAT and whole


def private_embeddings(observation: Observation, private: RowPrivacy) -> Observed:
    """The mean over rows of their embeddings, each cut, with noise. Raises :class:`CoterieError` for other rows."""
    rows = len(observation.examples)
    if rows != private.rows:
        raise CoterieError(f'[privacy] unit = "example": the noise is for {private.rows} rows, and there are {rows}')
    total: dict[Key, torch.Tensor] = {}
    for row in _of_rows(observation):
        values = {key: value.double().nan_to_num(0.0, 0.0, 0.0) for key, value in row.items()}
        length = float(sum(float(value.square().sum()) for value in values.values())) ** 0.5
        factor = min(1.0, private.embedding_clip / max(length, 1e-300))
        for key, value in values.items():
            total[key] = total[key] + factor * value if key in total else factor * value
    deviation = private.measured.multiplier * private.embedding_clip
    about = observation.client.info.id, observation.rnd
    noisy = {
        key: value + deviation * private.noise.normal(tuple(value.shape), *about, "embeddings", str(key))
        for key, value in sorted(total.items())
    }
    return Observed({}, 0, {key: (value / rows).float() for key, value in noisy.items()})


def _of_rows(observation: Observation) -> Iterator[Tensors]:
    """The mean embeddings of one row after another, each in a pass of its own."""
    workplace, now = observation.workplace, observation.layers.now
    with on_base(workplace, [observation.layers]) as passes, evaluating(workplace.base.model):
        for example in observation.examples:
            now.embeddings, now.seen = {}, {}
            for joined in passes.in_step([in_order(workplace.task, [example], 1)]):
                observation.begin_pass(joined.parts[0], joined.mask(0, False))
                passes.outputs(joined)
            embeddings = observation.request.wanted(now.embeddings)
            yield {key: (value / now.seen[key.module]).cpu() for key, value in embeddings.items()}
    now.embeddings = now.mask = None
