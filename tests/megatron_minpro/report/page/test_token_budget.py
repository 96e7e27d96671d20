from __future__ import annotations

from megatron_minpro.report.page.token_budget import choose, evenly, page_characters


def test_even_choices_hold_both_ends() -> None:
    assert evenly(range(10), 4) == [0, 3, 6, 9]
    assert evenly(range(3), 5) == [0, 1, 2]
    assert (evenly(range(3), 1), evenly([], 3)) == ([2], [])


def test_as_many_whole_steps_as_fit_are_taken() -> None:
    sizes = {step: [10, 10] for step in range(2, 12)}
    assert dict(choose(sizes, budget=200).responses) == dict.fromkeys(range(2, 12), 2)
    assert dict(choose(sizes, budget=99).responses) == {2: 2, 5: 2, 8: 2, 11: 2}
    assert dict(choose({}, budget=99).responses) == {}


def test_where_two_steps_do_not_fit_the_ends_share_the_room() -> None:
    sizes = {1: [10, 10, 10], 2: [10], 3: [10, 10, 10]}
    assert dict(choose(sizes, budget=35).responses) == {3: 2, 1: 1}
    assert dict(choose({1: [40], 3: [50, 5]}, budget=40).responses) == {1: 1}


def test_a_response_takes_36_characters_a_trained_token() -> None:
    one = page_characters(num_tokens=0, num_response_tokens=0)
    # two bytes of the piece, six float32 and the cut: 27 bytes, as base64
    assert page_characters(num_tokens=3000, num_response_tokens=3000) - one == 27 * 3000 * 4 / 3
