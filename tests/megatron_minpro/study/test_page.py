"""The page of a study: its data by hand, and once in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_minpro.study.cells import Cell
from megatron_minpro.study.definition import Study
from megatron_minpro.study.page import study_page, write_study_page
from megatron_minpro.study.rows import Row, failed_row

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def rows(cells: dict[str, Cell], make_row: Callable[..., Row]) -> dict[str, Row]:
    """All cells but those of grpo at lag 2, of which one failed; cispo lies 0.1 below the others."""
    found = {
        name: make_row(cell, pass_at_1_after=0.5 + 0.01 * cell.seed - 0.1 * (cell.levels["objective"] == "cispo"))
        for name, cell in cells.items()
        if not name.startswith("grpo_staleness2")
    }
    failed = cells["grpo_staleness2_seed1"]
    return found | {failed.name: failed_row(failed, HOSTILE)}


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_curves_are_means_over_seeds_by_family_and_level(study: Study, rows: dict[str, Row]) -> None:
    data = data_of(study_page(study, rows, total=18))
    lag_0, lag_2 = data["curves"]["reward"]
    assert list(lag_0) == ["cispo", "grpo", "minpro"] and list(lag_2) == ["cispo", "minpro"]
    (batches, mean, low, high), second = lag_2["minpro"]  # of three seeds: 0.1, 0.2 and 0.3, then 0.2 each
    assert (batches, mean) == (1, 0.2) and (second[0], second[1]) == (2, pytest.approx(0.2))
    assert (low, high) == (pytest.approx(0.2 - 4.302653 * 0.1 / 3**0.5, abs=1e-4), pytest.approx(0.2 + 4.302653 * 0.1 / 3**0.5, abs=1e-4))
    assert [point[1] for point in data["curves"]["clipped"][0]["cispo"]] == pytest.approx([0.3, 0.1, 0.1])
    assert data["curves"]["entropy"] == [{}, {}], "no row has it"
    assert data["shown"] == ["cispo", "grpo", "minpro"]


def test_tables_are_those_of_the_report_and_texts_stay_texts(study: Study, rows: dict[str, Row]) -> None:
    html = study_page(study, rows, total=18)
    assert "15 of 18 done, 1 failed" in html
    assert "0.420 ± 0.025" in html, "cispo: 0.41, 0.42 and 0.43"
    assert re.search(r'<th scope="row">minpro</th><td class="number marked">\+0\.100 \[\+0\.100, \+0\.100\]', html)
    assert HOSTILE not in html and "&lt;img src=x onerror=alert(1)&gt;" in html


def test_a_study_without_reference_or_data_for_a_curve_has_a_page(study: Study, rows: dict[str, Row]) -> None:
    alone = study.model_copy(update={"reference": {}})
    alone.remember(study.origins, study.path)
    bare = {name: replace(row, curves={}) for name, row in rows.items()}
    html = study_page(alone, bare, total=18)
    assert "Differences from" not in html and data_of(html)["curves"]["reward"] == [{}, {}]


def test_levels_are_switched_and_nothing_is_said_on_the_console(study: Study, rows: dict[str, Row], browser: Any, tmp_path: Path) -> None:
    path = write_study_page(tmp_path, study, rows, total=18)
    messages: list[str] = []
    requests: list[str] = []
    for viewport in ({"width": 1280, "height": 800}, {"width": 390, "height": 800}):
        page = browser.new_page(viewport=viewport)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]")
        lines = "figure[data-family='1'] svg .mark-line path"
        assert page.locator(lines).count() == 2
        page.focus("[data-level=minpro]")
        page.keyboard.press("Space")
        page.wait_for_function(f"document.querySelectorAll({lines!r}).length === 1".replace(chr(34), chr(96)))
        assert page.get_attribute("[data-level=minpro]", "aria-pressed") == "false"
        page.select_option("#curve", "entropy")
        page.wait_for_function("document.querySelectorAll('figure[data-family] svg').length === 0")
        assert page.locator("figure .missing").all_inner_texts() == ["no chosen level has this curve"] * 2
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        page.close()
    assert messages == [] and set(requests) == {path.as_uri()}
