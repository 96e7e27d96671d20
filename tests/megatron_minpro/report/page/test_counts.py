from __future__ import annotations

from megatron_minpro.report.page.counts import counts

METRICS = [
    {"servers/retries": 2.0, "servers/restarts": 0.0, "total/rollouts_sampled": 64, "total/rollouts_dropped": 8},
    {"servers/retries": 1.0, "servers/restarts": 1.0, "total/rollouts_sampled": 128},
]


def values(**result: int) -> dict[str, int | None]:
    return {count.label: count.value for count in counts(METRICS, result or None)}


def test_a_running_run_says_what_its_last_step_said() -> None:
    assert values() == {
        "sampled": 128,
        "trained": None,
        "dropped": 8,
        "lost": None,
        "not graded": None,
        "retried": 3,
        "restarted": 1,
    }


def test_the_result_of_an_ended_run_comes_first() -> None:
    found = values(rollouts_sampled=130, rollouts_trained=100, rollouts_dropped=10, rollouts_lost=20)
    assert (found["sampled"], found["trained"], found["dropped"], found["lost"]) == (130, 100, 10, 20)
