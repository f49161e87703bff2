"""What a site refuses to a server that follows no rule, and what a lying site can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from coterie import codec
from coterie.methods.secure import SecureAggregationSettings
from coterie.secure.collector import Collector, Opened
from coterie.secure.identity import identities
from coterie.secure.member import Member
from coterie.secure.messages import Confirmations, Inbox, Revealed, Roster, Survivors
from coterie.secure.session import SecureSumError, Session, check_connected, needed_of, neighbours_of
from coterie.secure.steps import Ask, in_process, sums
from secure_sums import KNOWN, opened, parties, session, vectors


def members(of: Session) -> dict[str, Member]:
    return {site: Member(of, site, KNOWN[site]) for site in of.members}


def up_to_values(of: Session) -> dict[str, Member]:
    """The members of a session whose vectors have all arrived."""
    group, server, own = members(of), Collector(of), vectors(of)
    roster = server.roster({site: m.keys() for site, m in group.items()})
    inboxes = server.inboxes({site: m.shares(roster[site]) for site, m in group.items()})
    masked = {site: m.values(inboxes[site], lambda site=site: own[site]) for site, m in group.items()}  # type: ignore[misc]
    assert not any((of_site.values.numpy() == own[site].view("int64")).any() for site, of_site in masked.items())
    return group


def test_keys_of_another_round_group_or_site_are_refused() -> None:
    of = session(4)
    group = members(of)
    keys = {site: m.keys() for site, m in group.items()}
    for other in (replace(of, rnd=2), replace(of, group="b"), replace(of, run="run 2"), replace(of, layout=("x",))):
        replayed = Member(other, "s1", KNOWN["s1"]).keys()
        with pytest.raises(SecureSumError, match="the signature of s1 is wrong"):
            group["s0"].shares(Roster({**keys, "s1": replayed}))
    stranger = Member(of, "s1", identities(["s1"])["s1"]).keys()
    with pytest.raises(SecureSumError, match="the signature of s1 is wrong"):
        group["s0"].shares(Roster({**keys, "s1": stranger}))
    with pytest.raises(SecureSumError, match="changed the keys of this site"):
        group["s0"].shares(Roster({**keys, "s0": Member(of, "s0", KNOWN["s0"]).keys()}))
    alone = Member(of, "s0", replace(KNOWN["s0"], peers={"s0": KNOWN["s0"].peers["s0"]}))
    own = alone.keys()
    with pytest.raises(SecureSumError, match=r"no public key of s1; put s1\.pub into"):
        alone.shares(Roster({**keys, "s0": own}))
    group["s0"].shares(Roster(keys))


def test_lists_that_are_too_short_or_name_others_are_refused() -> None:
    of = session(6)
    group = members(of)
    keys = {site: m.keys() for site, m in group.items()}
    with pytest.raises(SecureSumError, match="only 3 of 6 sites sent keys; 4 are needed"):
        group["s0"].shares(Roster({site: keys[site] for site in ("s0", "s1", "s2")}))
    with pytest.raises(SecureSumError, match="leaves this site out"):
        group["s0"].shares(Roster({site: keys[site] for site in ("s1", "s2", "s3", "s4")}))
    group["s0"].shares(Roster(keys))
    with pytest.raises(SecureSumError, match="names others than the step before"):
        group["s0"].values(Inbox((*of.members, "s7"), {}), lambda: vectors(of)["s0"])
    with pytest.raises(SecureSumError, match=r"only 3 of 6 sites sent shares"):
        group["s0"].values(Inbox(("s0", "s1", "s2"), {}), lambda: vectors(of)["s0"])


def test_two_lists_of_survivors_are_refused() -> None:
    group = up_to_values(session(6))
    one, other = ("s0", "s1", "s2", "s3"), ("s2", "s3", "s4", "s5")
    signed = {site: group[site].survivors(Survivors(one)) for site in one[:3]}
    signed |= {site: group[site].survivors(Survivors(other)) for site in other[1:]}
    with pytest.raises(SecureSumError, match="another message for the step 'survivors'"):
        group["s0"].survivors(Survivors((*other[:3], "s0")))
    for site, sites in (("s0", one), ("s4", other)):
        with pytest.raises(SecureSumError, match=r"the signature of s. is wrong"):
            group[site].reveal(Confirmations({s: signed[s].signature for s in sites}))
    with pytest.raises(SecureSumError, match="only 3 of 6 sites sent signatures"):
        group["s0"].reveal(Confirmations({s: signed[s].signature for s in one[:3]}))
    with pytest.raises(SecureSumError, match="names others"):
        group["s0"].reveal(Confirmations({s: signed[s].signature for s in (*one[:3], "s4")}))


def test_a_site_never_reveals_both_shares_of_another() -> None:
    group = up_to_values(session(6))
    left = ("s0", "s1", "s2", "s3")
    signed = {site: group[site].survivors(Survivors(left)).signature for site in left}
    for site in left:
        shown = group[site].reveal(Confirmations(signed))
        assert {*shown.seeds} == {*left}
        assert {*shown.masks} == {"s4", "s5"}
    with pytest.raises(SecureSumError, match="another message for the step 'reveal'"):
        group["s0"].reveal(Confirmations({**signed, "s0": signed["s1"]}))


def test_a_step_is_not_done_before_the_one_before_it() -> None:
    of = session(4)
    with pytest.raises(SecureSumError, match="'survivors' of this session has not been done"):
        members(of)["s0"].reveal(Confirmations({}))
    with pytest.raises(SecureSumError, match="'keys' of this session has not been done"):
        members(of)["s0"].shares(Roster({}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bits": 62}, "could overflow"),
        ({"bits": 1}, "could overflow"),
        ({"bound": 0.0}, "could overflow"),
        ({"bound": float("inf")}, "could overflow"),
        ({"length": 0}, "has no values"),
        ({"total": 0.0}, "has no values"),
        ({"total": float("inf")}, "has no values"),
        ({"min_group": 5}, "4 sites, and 5 are needed"),
        ({"members": ("s0", "s0", "s1", "s2")}, "names a site twice"),
        ({"threshold": 0.4}, "threshold is 0.4; it must be above 0.5"),
        ({"threshold": 0.5}, "threshold is 0.5"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"threshold": float("inf")}, "threshold is inf"),
        ({"min_group": 2}, "would open a sum of 2, and of fewer than 3 each member can compute the others' updates"),
    ],
)
def test_a_session_that_gives_too_much_away_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(SecureSumError, match=reason):
        Member(replace(session(4), **changes), "s0", KNOWN["s0"])


@pytest.mark.parametrize(
    "changes",
    [{"threshold": 1.0, "min_group": 3}, {"min_group": 4}, {"length": 1, "total": 0.5}, {"bits": 2}, {"bits": 61}],
)
def test_a_session_at_the_limits_is_accepted(changes: dict[str, object]) -> None:
    sites = 2**3 - 1 if changes.get("bits") == 61 else 4
    replace(session(sites), **changes).check()  # type: ignore[arg-type]


def test_another_session_under_a_name_is_refused_and_the_same_gets_the_same_answer() -> None:
    of = session(4)
    party = parties(of, vectors(of))["s0"]
    first = party.answer("keys", codec.encode({"one": of}))
    assert party.answer("keys", codec.encode({"one": of})) == first
    with pytest.raises(SecureSumError, match="another session of that name"):
        party.answer("keys", codec.encode({"one": replace(of, rnd=2)}))
    with pytest.raises(SecureSumError, match="knows nothing of that session"):
        party.answer("shares", codec.encode({"two": Roster({})}))
    with pytest.raises(SecureSumError, match="no step"):
        party.answer("open", b"")


def spoiling(ask: Ask, step: str, liar: str, spoil: object) -> Ask:
    """As ``ask``, with the answer of ``liar`` in one step changed."""

    def asked(now: str, messages: Mapping[str, bytes]) -> dict[str, bytes]:
        answers = dict(ask(now, messages))
        if now == step:
            answers[liar] = spoil(answers[liar])  # type: ignore[operator]
        return answers

    return asked


def test_wrong_shares_of_one_site_are_found_out() -> None:
    of = session(6)
    own = vectors(of)

    def wrong(blob: bytes) -> bytes:
        shown = codec.decode(dict[str, Revealed], blob)["one"]
        return codec.encode({"one": Revealed(dict.fromkeys(shown.seeds, "01" * 33), {})})

    result = sums({"one": of}, spoiling(in_process(parties(of, own)), "reveal", "s1", wrong))["one"]
    assert isinstance(result, Opened)
    assert (result.total == sum(own.values())).all()


@pytest.mark.parametrize("step", ["keys", "shares", "values"])
def test_a_site_that_sends_nonsense_has_vanished(step: str) -> None:
    of = session(6)
    own = vectors(of)
    result = sums({"one": of}, spoiling(in_process(parties(of, own)), step, "s1", lambda blob: b"nonsense"))["one"]
    assert isinstance(result, Opened)
    assert result.survivors == ("s0", "s2", "s3", "s4", "s5")
    assert result.vanished == {"s1": step}
    assert (result.total == sum(own[site] for site in result.survivors)).all()


def test_a_second_sum_over_a_tensor_is_refused() -> None:
    """With weights capped at 39 in place of 40, or over one site fewer, the difference would be one site's update."""
    of = replace(session(4, min_group=3), layout=("A 3", "B 2"))
    fewer = replace(of, members=of.members[:3], layout=("B 2", "A 3"), total=3.0)
    own = vectors(of)
    for second in (replace(of, most_examples=39), fewer, replace(fewer, layout=("A 5",))):
        out = sums({"one": of, "two": second}, in_process(parties(of, own)))
        assert isinstance(out["one"], Opened)
        assert "0 of its" in str(out["two"])
    both = sums({"one": of, "two": replace(of, layout=("C 5",))}, in_process(parties(of, own)))
    assert all(isinstance(result, Opened) for result in both.values())
    with pytest.raises(SecureSumError, match="names a tensor twice"):
        Member(replace(of, layout=("A 3", "A 2")), "s0", KNOWN["s0"])


def circle_of(of: Session, group: Mapping[str, Member]) -> list[str]:
    """The sites, each beside its neighbours, for sessions with two neighbours each."""
    graph = neighbours_of({site: m.keys().masks for site, m in group.items()}, of.neighbours)
    circle = [of.members[0]]
    while len(circle) < len(of.members):
        circle.append(next(site for site in graph[circle[-1]] if site not in circle))
    return circle


def test_survivors_that_fall_apart_are_refused_by_sites_and_server() -> None:
    """Two lost sites cut a circle into two arcs, and the masks of each arc add up to nothing by themselves."""
    of = session(8, neighbours=2)
    group = up_to_values(of)
    circle = circle_of(of, group)
    left = tuple(sorted({*circle} - {circle[0], circle[3]}))
    with pytest.raises(SecureSumError, match="share too few masks"):
        group[left[0]].survivors(Survivors(left))
    beside = tuple(sorted({*circle} - {circle[0], circle[1]}))
    group[beside[0]].survivors(Survivors(beside))
    result = opened(of, vectors(of), {"values": ()})
    assert isinstance(result, Opened)


def test_a_pair_that_has_signed_nothing_does_not_hold_survivors_together() -> None:
    """The server may have told each of the two that the other is gone, so that neither masked for the other."""
    line = {"a": ("b",), "b": ("a", "c"), "c": ("b", "d"), "d": ("c",)}
    check_connected(line, line, ["a", "b", "d"])
    with pytest.raises(SecureSumError, match="share too few masks"):
        check_connected(line, line, ["a", "d"])


@pytest.mark.parametrize("threshold", [2 / 3, SecureAggregationSettings().threshold])
def test_two_lists_of_survivors_need_a_third_of_the_sites_to_sign_both(threshold: float) -> None:
    for n in range(3, 1001):
        needed = needed_of(n, threshold, 3)
        assert 3 * (2 * needed - n) >= n
        assert 3 * (needed - 1) < 2 * n or n < 5  # and no more than that
