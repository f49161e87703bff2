"""Checks what comes from a client before it counts: keys, shapes, dtypes, finite values, bounded sizes.

Sites are other organisations' machines: everything that they send is checked here before it is added up, written or
shown.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from coterie.engines.base import Evaluation
from coterie.requests import Observed, Optim
from coterie.text import TEXT, name_fault, plain_text
from coterie.types import BaseSpec, ClientInfo, Key, Range, Reply

DTYPE = torch.float32  # of all that trains, whatever the base's dtype; a mean keeps the dtype of its first tensor
MOST = 1e15  # for any number that a client reports
_LOSS = 1e9  # training that diverges reports infinity or NaN instead
_TRAININGS = 10  # that a method may request in one round
_ROW_TOKENS = 2**20
_WEIGHT = 1e6  # of a gate
_ROWS = 2**53  # beyond this a float cannot count single rows
_SIZE = 2**24  # for a side of a matrix
_ITEMS = 100_000  # numbers, texts and names in one piece of JSON
_DEPTH = 8
_FRACTIONS = {"accuracy", "macro_f1", "rouge_l", "exact_match", "token_f1", "numeric"}
_RANGES = {**dict.fromkeys(_FRACTIONS, (0.0, 1.0)), "matthews": (-1.0, 1.0), "loss": (0.0, _LOSS)}
_METRICS = 20  # in one split


def fault_of(
    reply: Reply,
    expected: Mapping[Key, tuple[int, ...]],
    norm_bound: float,
    num_train: int,
    info: Mapping[str, Range] | None = None,
    optim: Optim | None = None,
    rows: Sequence[int] = (),
) -> str | None:
    """Why ``reply`` must be left out, or None if it is good. ``info``: the numbers that its ``info`` must hold.

    ``optim`` bounds the steps and tokens that the reply may report, for training on ``rows`` rows of one client or of
    several; by default on the client's own.
    """
    fault = _fault_of(reply, expected, norm_bound, num_train)
    fault = fault or _statistics_fault(reply.info, rows or (num_train,), optim) or _info_fault(reply.info, info or {})
    return fault and plain_text(fault)  # it may name keys, which the client wrote


def _fault_of(reply: Reply, expected: Mapping[Key, tuple[int, ...]], norm_bound: float, num_train: int) -> str | None:
    if missing := sorted(expected.keys() - reply.tensors.keys()):
        return f"the reply lacks {_some(missing)}"
    if surplus := sorted(reply.tensors.keys() - expected.keys()):
        return f"the reply has {_some(surplus)}, which was not requested"
    for key, value in reply.tensors.items():
        if fault := tensor_fault(key, value, expected[key]):
            return fault
    norm = float(sum(value.double().square().sum() for value in reply.tensors.values())) ** 0.5
    if norm > norm_bound:
        return f"the reply's norm {norm:.3g} is above the bound {norm_bound:g} ([run] norm_bound)"
    if not 1 <= reply.num_examples <= num_train:
        return f"the reply claims {shown(reply.num_examples)} training examples; the client has {num_train}"
    return None


def tensor_fault(key: Key, value: Tensor, shape: tuple[int, ...]) -> str | None:
    """Why a client's tensor is refused, or None: it has this shape and :data:`DTYPE`, and its values are finite."""
    if tuple(value.shape) != shape:
        return f"{key} has the shape {list(value.shape)}, not {list(shape)}"
    if value.dtype != DTYPE:
        return f"{key} has the dtype {value.dtype}, not {DTYPE}"
    if not bool(torch.isfinite(value).all()):
        return f"{key} has values that are not finite"
    return None


def _statistics_fault(info: Mapping[str, object], rows: Sequence[int], optim: Optim | None) -> str | None:
    """Why the statistics beside a reply's tensors are refused. A loss may be infinity or NaN: training can diverge."""
    if fault := json_fault(info):
        return f"the reply's JSON {fault}"
    steps = _TRAININGS * sum(map(optim.steps_on, rows)) if optim else MOST
    tokens = steps * optim.batch_size * optim.accumulate * _ROW_TOKENS if optim else MOST
    for name, most in (("steps", steps), ("tokens", tokens)):
        if name in info and not (isinstance(info[name], int) and is_number(info[name], high=most)):
            return f"the reply's number of {name} is {shown(info[name])}, not an integer from 0 to {most:.3g}"
    for name in ("gflop", "gflop_active"):
        if not is_number(info.get(name, 0.0)):
            return f"the reply's {name} is {shown(info[name])}, not a number from 0 to {MOST:g}"
    for name in ("loss", "balance"):
        value = info.get(name, 0.0)
        if not is_number(value, high=_LOSS) and not (_is_infinite(value) and value != -math.inf):
            return f"the reply's {name} is {shown(value)}, not a number from 0 to {_LOSS:g}"
    return None


def _info_fault(info: Mapping[str, object], wanted: Mapping[str, Range]) -> str | None:
    """Why the numbers that a method wants in ``info`` are refused."""
    for name, of in wanted.items():
        if name not in info:
            if not of.optional:
                return f"the reply's info lacks {name}"
            continue
        value = info[name]
        if of.names is None:
            numbers = {name: value}
        elif isinstance(value, Mapping) and value.keys() == of.names:
            numbers = {f"{name}[{each!r}]": number for each, number in value.items()}
        else:
            return f"the reply's {name} must have a number for each of {_few(sorted(of.names))}"
        for what, number in numbers.items():
            if not is_number(number, of.low, of.high) or (of.whole and not isinstance(number, int)):
                kind = "an integer" if of.whole else "a number"
                return f"the reply's {what} is {shown(number)}, not {kind} from {of.low:g} to {of.high:g}"
    return None


def evaluation_fault(
    evaluation: Evaluation, splits: Collection[str], modules: Collection[str], rows: int
) -> str | None:
    """Why a site's ``evaluation`` of the requested ``splits`` must be left out, or None.

    ``modules`` are the base's, ``rows`` is the number of the site's rows.
    """
    for split, metrics in evaluation.scores.items():
        if split not in splits:
            return f"it scores {shown(split)}, which was not requested"
        if "loss" not in metrics or len(metrics) > _METRICS:
            return f"its {split} metrics lack the loss, or are more than {_METRICS}"
        for name, value in metrics.items():
            low, high = _RANGES.get(name, (-MOST, MOST))
            if not (is_number(value, low, high) or (name == "perplexity" and value == math.inf)):
                return f"its {split} {shown(name)} is {shown(value)}"
            if not (name.isidentifier() and name.isascii() and len(name) <= 50):
                return f"{shown(name)} is not a valid name of a metric"
    return _usage_fault(evaluation.observed, modules, rows) if evaluation.observed else None


def _usage_fault(observed: Observed, modules: Collection[str], rows: int) -> str | None:
    if observed.embeddings or observed.directions or observed.importance:
        return "it holds embeddings or importance, which were not requested"
    if not is_number(observed.tokens, high=rows * _ROW_TOKENS):
        return f"its usage is over {shown(observed.tokens)} tokens of {rows} rows"
    for module, row in observed.usage.items():
        if module not in modules:
            return f"it reports the usage of {shown(module)}, which the base does not have"
        if not len(row.weight) == len(row.share) == len(row.expert):
            return f"its usage of {module} does not give each expert's weight, share and number"
        good = all(is_number(value, high=_WEIGHT) for value in row.weight) and all(
            is_number(v, 0, 1.001) for v in row.share
        )
        if not good or not row.expert or not all(type(e) is int and -2 <= e < _SIZE for e in row.expert):
            return f"its usage of {module} has numbers out of range"
    return None


def site_fault(info: ClientInfo, spec: BaseSpec) -> str | None:
    """Why a site's description of itself is refused, or None: its counts of rows, labels and targets have bounds."""
    if not all(0 <= count < _ROWS for count in (info.num_train, info.num_validation, info.num_test)):
        return "its numbers of rows are out of range"
    if info.active is not None and not 1 <= info.active <= _SIZE:
        return "its number of active experts is out of range"
    texts = [*(info.labels or ()), *([info.group] if info.group else []), *(t.name for t in spec.targets)]
    texts += [*(t.weights for t in spec.targets), *(p.name for p in spec.head)]
    if len(texts) > _ITEMS or len(info.labels or ()) > 10_000 or any(len(text) > TEXT for text in texts):
        return "it has too many labels or targets, or names that are too long"
    if any(name_fault(text, "\n\t") for text in texts):
        return "it has names with characters that cannot be shown"
    sides = [side for t in spec.targets for side in (t.d_in, t.d_out)]
    sides += [abs(side) for p in spec.head for side in p.shape]
    if not all(1 <= side <= _SIZE for side in sides) or not is_number(spec.head_std, 0, 1e3):
        return "its base has sizes out of range"
    return None


def json_fault(value: object) -> str | None:
    """Why ``value`` is not accepted as JSON: wrong types, too many values, too deep, or too large."""
    todo, seen = [(value, 0)], 0
    while todo:
        item, depth = todo.pop()
        seen += 1
        if seen > _ITEMS or depth > _DEPTH:
            return "is too large"
        if isinstance(item, Mapping):
            todo += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, (list, tuple)):
            todo += [(part, depth + 1) for part in item]
        elif isinstance(item, str):
            if len(item) > TEXT:
                return "has a text that is too long"
        elif not (item is None or isinstance(item, bool) or is_number(item, -MOST) or _is_infinite(item)):
            return f"holds {shown(item)}"
    return None


def is_number(value: object, low: float = 0.0, high: float = MOST) -> bool:
    """Whether ``value`` is a number from ``low`` to ``high``, and no bool.

    An integer of JSON may be larger than any float: :func:`math.isfinite` raises for it, comparing does not.
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def shown(value: object) -> str:
    """A client's value as an error quotes it. An integer may have more digits than Python prints."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value) if is_number(value, -MOST) or isinstance(value, float) else "a number that is too large"
    return repr(plain_text(value, 80)) if isinstance(value, str) else f"a {type(value).__name__}"


def _some(keys: Sequence[Key]) -> str:
    return _few([plain_text(str(key), 120) for key in keys])


def _few(texts: Sequence[str]) -> str:
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
