"""The draft length: long where copying goes well, nothing where it does not pay, and quick to change its mind."""

from __future__ import annotations

from paceline.drafters.chooser import (
    COPY_PRIORS,
    LONG,
    LOST,
    LOST_LONG,
    MODEL,
    NOT_GUESSED,
    NOTHING_COPIED,
    Acceptance,
    GlobalAcceptance,
    Guessed,
    Observation,
    Probes,
    choose_each,
    choose_uniform,
    keep_expected,
)
from paceline.drafters.copy import CopyDrafter
from paceline.engine.cost import StepCost


def up_to(limit: int) -> list[int]:
    return [each for each in CopyDrafter.lengths if each <= limit]


def cost(length: int) -> float:
    """Like an H100's: 1.3 ms and little more for a draft."""
    return 1.3 + 0.4 * (length > 0) + 0.006 * length


def record(streak: int, lost: int = 0) -> Acceptance:
    made = GlobalAcceptance().new_request()
    made.set_streak(streak, lost)
    return made


def test_a_long_streak_drafts_as_far_as_it_may() -> None:
    assert choose_uniform([record(40)], up_to(256), cost) == 256
    assert choose_uniform([record(40)], up_to(64), cost) == 64


def test_plain_chat_stops_drafting_within_a_few_steps() -> None:
    chat = record(0)
    lengths = []
    for _ in range(12):
        length = choose_uniform([chat], up_to(256), cost)
        lengths.append(length)
        chat.observe(Observation(chat.state, length, 0, False), 0)
    assert lengths[4:] == [0] * 8


def test_a_right_guess_while_not_drafting_brings_drafts_back() -> None:
    chat = record(0, lost=50)
    for _ in range(20):
        chat.observe(Observation(LOST_LONG, 0, 0, False), 0)
    assert choose_uniform([chat], up_to(256), cost) == 0
    for streak in (4, 5, 6, 9, 20, 40):
        chat.observe(Observation(chat.state, 0, 0, True), streak)
    assert choose_uniform([chat], up_to(256), cost) >= 64


def test_a_full_batch_where_queries_cost_drafts_nothing() -> None:
    assert choose_uniform([record(0) for _ in range(64)], up_to(16), lambda length: 2.3 + 0.28 * length) == 0


def test_each_request_gets_its_own_length_where_the_device_allows() -> None:
    lengths = choose_each([record(64), record(0, lost=50)], up_to(256), lambda queries, depth: 70 + 7 * queries)
    assert lengths[0] >= 64 and lengths[1] == 0


def test_rates_of_all_requests_are_the_prior_of_a_new_one_and_its_own_outweigh_them() -> None:
    rates = GlobalAcceptance()
    for _ in range(200):
        rates.observe(Observation(LOST, 8, 0, False))
    assert rates.new_request().rates[LOST][0].value < 0.05
    one = rates.new_request()
    for _ in range(6):
        one.observe(Observation(LOST, 8, 8, True), 40)
    assert one.rates[LOST][0].value > 0.6 and one.state == LONG


def guessed(length: int) -> Guessed:
    return {7: Guessed(7), 15: Guessed(7, 0.3)}.get(length, NOT_GUESSED)


def joint_depth(length: int) -> int:
    return guessed(length).depth


def test_a_joint_draft_where_nothing_is_copied_and_copies_alone_where_all_is() -> None:
    lengths = (0, 7, 8, 15, 16, 64, 256)

    def seconds(length: int) -> float:
        return 1.0 + 0.03 * joint_depth(length) + 0.004 * length

    rates = GlobalAcceptance(COPY_PRIORS, (0.75, 0.8))
    lost, long = rates.new_request(), rates.new_request()
    lost.set_streak(0, 9)
    long.set_streak(100)
    assert choose_uniform([lost], lengths, seconds, guessed) == 15, "tokens beside the chain are worth their queries"
    assert choose_uniform([long], lengths, seconds, guessed) == 256

    def of_step(queries: int, depth: int) -> float:
        return 1 + 0.03 * depth + 0.004 * queries

    assert [joint_depth(each) for each in choose_each([lost, lost], lengths, of_step, guessed)] == [7, 7]
    assert choose_each([lost, long], lengths, of_step, guessed)[1] == 256


def test_what_a_trained_drafter_has_right_is_not_counted_as_copied() -> None:
    rates = GlobalAcceptance(COPY_PRIORS, (0.5, 0.5))
    one = rates.new_request()
    copied = one.rates[LOST][0].value
    for _ in range(60):
        one.observe(Observation(LOST, 15, 7, False, model_drafted=7, model_accepted=7), 0)
    assert one.rates[LOST][0].value < copied
    assert one.rates[MODEL][0].value > 0.9 and one.rates[MODEL][1].value > 0.9


def test_drafts_that_disappoint_are_expected_to_gain_less() -> None:
    """Rates that say too much: two tokens beside each chain are never right, so a step gains less than they let expect."""
    rates = GlobalAcceptance(NOTHING_COPIED, (0.5, 0.5))
    one = rates.new_request()

    def of_tree(length: int) -> Guessed:
        return Guessed(4, 0.8) if length else NOT_GUESSED

    def seconds(length: int) -> float:
        return 1.6 if length else 1.0

    assert choose_uniform([one], (0, 7), seconds, of_tree) == 7
    for step in range(40):
        keep_expected([one], [7], of_tree)
        assert one.expected > 0.7
        seen = Observation(LOST, 7, step % 2, False, model_drafted=4, model_accepted=step % 2, expected=one.expected)
        rates.observe(seen)
        one.observe(seen, 0)
    assert one.trust.value < 0.8 and rates.new_request().trust.value < 0.8
    assert choose_uniform([one], (0, 7), seconds, of_tree) == 0
    assert choose_each([one, one], (0, 7), lambda queries, depth: 1.0 + 0.04 * queries + 0.05 * depth, of_tree) == [
        0,
        0,
    ]
    keep_expected([one], [0], of_tree)
    assert one.expected == 0


def test_a_first_step_that_took_long_is_forgotten() -> None:
    cost = StepCost()
    for seconds in (0.4, 0.05, 0.06):
        cost.add(1, seconds)
    assert 0.05 < cost(1) < 0.06
    cost.add(1, 0.05)
    cost.add(9, 0.07)
    cost.add(9, 0.5)
    assert 0.07 < cost(9) < 0.5, "a second step that took longer counts as any other"


def test_probes_come_ever_more_seldom_while_drafts_do_not_pay() -> None:
    probes = Probes()
    due = [step for step in range(1, 2000) if probes.due(False)]
    assert due[:5] == [16, 48, 112, 240, 496] and due[6] - due[5] == 256
    assert not probes.due(True)
    assert [step for step in range(1, 40) if probes.due(False)] == [16]


def test_requests_share_the_passes_of_a_trained_drafter() -> None:
    """One alone would not pay for them, so the choice must be made for all together."""
    rates = GlobalAcceptance(COPY_PRIORS, (0.9, 0.95))
    records = [rates.new_request() for _ in range(8)]
    for each in records:
        each.set_streak(0, 9)
    chosen = choose_each(records, (0, 7, 8), lambda queries, depth: 1 + 0.01 * queries + 0.05 * depth, guessed)
    assert chosen == [7] * 8
