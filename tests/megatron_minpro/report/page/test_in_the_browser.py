"""The page as a person uses it, in one Chromium."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from megatron_minpro.report.page.write import write_page
from megatron_minpro.report.runs import read_run
from megatron_minpro.tracking.token_records import read_token_records
from megatron_minpro.tracking.versions import append_versions

TABS = ("run", "off_policy", "tokens")
TIME_LIMIT_MS = 120_000  # a tab takes 0.3 s on two idle cores
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
TEXTS = [list(f"4+5:{answer};".encode()) for answer in ("9", "10", "9 = 3 * 3", "世界")]
EVIL = "<script>window.ran = 1; alert(1)</script><img src=x onerror='window.ran = 1'>\x1b[31m\u202egnihton"


@dataclass(eq=False)
class Opened:
    """A page in the browser, with all that it said or asked for."""

    page: Page
    messages: list[str] = field(default_factory=list)  # of the console, dialogs and errors
    requests: list[str] = field(default_factory=list)

    def show(self, tab: str) -> None:
        self.page.click(f"#tab-{tab}")
        self.page.wait_for_selector(f"#panel-{tab}[data-ready]", state="attached")

    def overflow(self) -> int:
        """Pixels that the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Opened]]:
    contexts = []

    def open_it(path: Path, *, scheme: str = "light", viewport: dict[str, int] = DESKTOP) -> Opened:
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        context.set_default_timeout(TIME_LIMIT_MS)
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.on("console", lambda message: opened.messages.append(message.text))
        opened.page.on("pageerror", lambda error: opened.messages.append(str(error)))
        opened.page.on("dialog", lambda dialog: (opened.messages.append(dialog.message), dialog.dismiss()))
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.goto(path.as_uri())
        opened.page.wait_for_selector("[role=tabpanel][data-ready]")
        return opened

    yield open_it
    for context in contexts:
        context.close()


@pytest.fixture
def run_dir(write_run: Callable[..., Path], record_tokens: Callable[..., Path], byte_tokenizer: Callable[..., Path]) -> Path:
    """A run with every metric that a chart needs, and two recorded mini-batches."""
    folder = write_run("small", rewards=(0.2, 0.3, 0.5))
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines[1:], start=1):
        line |= {f"log_ratio/p{percent:02d}": number * (percent - 50) / 500 for percent in (1, 5, 25, 50, 75, 95, 99)}
        line |= {f"log_prefix_min/p{percent:02d}": number * (percent - 100) / 500 for percent in (1, 5, 25, 50, 75, 95, 99)}
        line |= {f"effective_sample_size/{level}": 1 / (1 + number) for level in ("token", "prefix", "sequence")}
        for group, sign in (("log_prefix_min", -1), ("weight", 1)):
            for place in ("token_1", "tokens_2_3", "tokens_4_7", "share_20_50", "share_50_100"):
                line[f"{group}/{place}"] = sign * 0.1 * number
        for place, stretch in enumerate(("token_1", "tokens_2_3", "share_20_50", "share_50_100"), start=1):
            for band, value in (("p05", -0.25), ("p50", -0.0625), ("p95", 0.125)):
                line |= {
                    f"log_ratio_{band}/{stretch}": number * place * value,
                    f"log_prefix_min_{band}/{stretch}": number * place * -abs(value),
                }
        line |= {"engine_logprob_gap/mean": 1e-6, "log_ratio/mean_square": 0.01 * number, "policy/entropy": 1.0 / number}
        line |= {"update/grad_norm": 0.5, "clip/hard": 0.0, "clip/soft": 0.02, "rollout/length": 40.0, "prefix_min/mean": 0.9}
        line |= {"throughput/tokens_per_second": 2000.0, "time/update": 1.0, "time/wait": 0.5, "time/sample": 1.5}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record_tokens(folder, TEXTS, step=1)
    record_tokens(folder, TEXTS, step=2, update=3, finish_reasons=["stop", "length", "stop", "stop"])
    byte_tokenizer(folder=folder / "policy")
    return folder


def page_of(run_dir: Path, *others: Path) -> Path:
    return write_page([read_run(folder) for folder in (run_dir, *others)], run_dir / "report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_draws_its_charts_and_says_nothing_on_the_console(scheme: str, run_dir: Path, open_page: Callable[..., Opened]) -> None:
    opened = open_page(page_of(run_dir), scheme=scheme)
    for tab in TABS:
        opened.show(tab)
        plots = opened.page.locator(f"#panel-{tab} .plot")
        assert plots.count() >= {"run": 10, "off_policy": 12, "tokens": 1}[tab]
        assert opened.page.locator(f"#panel-{tab} .plot svg").count() == plots.count()
    assert opened.messages == []
    assert opened.requests == [(run_dir / "report.html").as_uri()]
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, background[4:-1].split(","))) < 64) == (scheme == "dark")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_heat_map_of_many_steps_has_the_colours_of_its_scale(
    viewport: dict[str, int], run_dir: Path, open_page: Callable[..., Opened]
) -> None:
    """Cells narrower than a pixel too: neither lines between them nor soft edges mix a colour with the background."""
    lines = [{"global_step": step, "weight/token_1": 0.5, "weight/tokens_2_3": 0.6} for step in range(700)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened = open_page(page_of(run_dir), viewport=viewport)
    opened.show("off_policy")
    chart = opened.page.locator("[data-chart=weight_place]")
    swatches = chart.locator(".swatch").evaluate_all("all => all.map((one) => getComputedStyle(one).backgroundColor)")
    picture = Image.open(io.BytesIO(chart.locator(".plot").screenshot())).convert("RGB")
    row = [picture.getpixel((x, picture.height // 4)) for x in range(picture.width // 3, 2 * picture.width // 3)]
    assert {f"rgb({red}, {green}, {blue})" for red, green, blue in row} <= set(swatches)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour_of_the_scale(scheme: str, run_dir: Path, open_page: Callable[..., Opened]) -> None:
    opened = open_page(page_of(run_dir), scheme=scheme)
    opened.show("tokens")
    shades = opened.page.evaluate(
        "[...document.querySelectorAll('#panel-tokens .swatch')].map((one) => getComputedStyle(one).backgroundColor)"
    )
    ink = opened.page.evaluate("getComputedStyle(document.querySelector('.token[data-i]')).color")
    assert len(set(shades)) == 9
    assert min(contrast(ink, shade) for shade in shades) >= 4.5  # WCAG AA


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two CSS colours, WCAG 2.2."""
    lighter, darker = sorted(map(luminance, (one, other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    channels = [int(text) / 255 for text in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_tabs_and_tokens_are_reached_by_keyboard(run_dir: Path, open_page: Callable[..., Opened]) -> None:
    page = open_page(page_of(run_dir)).page
    page.keyboard.press("Tab")
    for tab in (*TABS[1:], TABS[0]):
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == f"tab-{tab}"
        assert page.locator(f"#panel-{tab}").is_visible()
        assert page.locator("[role=tabpanel]:visible").count() == 1
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(".token[data-i='0']")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.token')"):
            break
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.i") == "1"
    page.keyboard.press("End")
    assert page.locator(".numbers [data-number=place] td").last.inner_text() == "{0} of {0}".format(page.locator(".text [data-i]").count())
    page.keyboard.press("m")
    assert page.locator(".minimum-line").is_visible() and page.evaluate("document.activeElement.matches('.token')")


def test_a_tokens_numbers_are_those_of_the_file(run_dir: Path, open_page: Callable[..., Opened]) -> None:
    records = read_token_records(next((run_dir / "tokens").glob("*update_0003*")))
    opened = open_page(page_of(run_dir))
    opened.show("tokens")
    page = opened.page
    page.select_option("[data-filter=step]", "2")
    page.select_option("[data-filter=order]", "trained")
    page.locator("#panel-tokens tbody tr button").nth(2).click()
    begin = sum(response.num_response_tokens for response in records.responses[:2])
    streams = {
        name: values[begin:].astype(np.float64) for name, values in records.streams.items() if name not in ("token_ids", "loss_mask")
    }
    for place in (0, 3, 8):
        page.locator(f".text [data-i='{place}']").hover()
        behaviour, trained = streams["behaviour_logprobs"][place], streams["logprobs"][place]
        expected = {
            "log-prob, server": streams["engine_logprobs"][place],
            "log-prob, behaviour": behaviour,
            "log-prob, trained": trained,
            "ratio": np.exp(trained - behaviour),
            "prefix minimum": np.exp(streams["prefix_min"][place]),
            "product of ratios": np.exp(streams["cumulative"][place]),
            "weight": streams["weights"][place],
            "advantage × weight": records.responses[2].advantage * streams["weights"][place],
            "entropy (nats)": streams["entropy"][place],
        }
        shown = {name: page.locator(f".numbers [data-number='{name}'] td").last.inner_text() for name in expected}
        assert {name: float(text.replace("−", "-")) for name, text in shown.items()} == {
            name: float(f"{value:.4g}") for name, value in expected.items()
        }
        lowest = int(np.argmin((streams["logprobs"] - streams["behaviour_logprobs"])[:place])) if place else None
        said = page.locator(".minimum-line").inner_text()
        assert said == "No token before it." if lowest is None else said.startswith(f"minimum set by token {lowest + 1} ")
        held = "weight held at the lower bound" if streams["cut"][place] else "no bound"
        assert page.locator(".cut-line").inner_text() == held


def test_the_line_of_a_long_response_keeps_its_extremes(
    run_dir: Path, record_tokens: Callable[..., Path], open_page: Callable[..., Opened]
) -> None:
    record_tokens(run_dir, [[65] * 9000], step=3)
    opened = open_page(page_of(run_dir))
    opened.show("tokens")
    opened.page.select_option("[data-filter=step]", "3")
    assert opened.page.locator(".text [data-i]").count() == 9000 - 3
    values = [0.0] * 9000
    values[17], values[8123] = -7.0, 9.0
    kept = opened.page.evaluate("(values) => extremes(values)", values)
    assert {0, 17, 8123, 8999} <= set(kept) and len(kept) <= 2002 and kept == sorted(kept)
    assert "lowest and highest of each stretch" in opened.page.locator(".token-chart .unit").inner_text()
    assert opened.messages == []


def test_filters_leave_the_responses_they_name(run_dir: Path, open_page: Callable[..., Opened]) -> None:
    opened = open_page(page_of(run_dir))
    opened.show("tokens")

    def found(**filters: str) -> int:
        for name, value in filters.items():
            control = opened.page.locator(f"[data-filter={name}]")
            (control.fill if name == "lowest" else control.select_option)(value)
        return int(opened.page.locator(".found").inner_text().split()[0])

    assert found() == 8
    assert found(step="2") == 4
    assert found(finish="truncated") == 1
    assert found(reward="wrong") == 0  # the truncated one is right
    assert not opened.page.locator(".response").is_visible()
    assert found(finish="", reward="correct", step="") == 4
    lows = [float(low.min()) for low in prefix_minima(run_dir)]
    assert found(reward="", lowest="0.7") == sum(low < np.log(0.7) for low in lows) > 0


def prefix_minima(run_dir: Path) -> Iterator[np.ndarray]:
    for path in (run_dir / "tokens").iterdir():
        records, begin = read_token_records(path), 0
        for response in records.responses:
            yield records.streams["prefix_min"][begin : begin + response.num_response_tokens]
            begin += response.num_response_tokens


def make_hostile(
    run_dir: Path, byte_tokenizer: Callable[..., Path], record_tokens: Callable[..., Path], log_rollouts: Callable[..., None]
) -> None:
    """Text that would do something, everywhere a run can bring text."""
    long = "x" * 1_000_000
    append_versions(run_dir, global_step=0, versions={"torch": "1"})
    append_versions(run_dir, global_step=2, versions={EVIL: EVIL, "torch": "2"})
    config = (run_dir / "config.yaml").read_text().replace("final_step", json.dumps(EVIL)[1:-1].replace("'", "''"))
    (run_dir / "config.yaml").write_text(f"{config}\nother_project: {json.dumps(EVIL)}\n")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"global_step": 4, f"custom/{EVIL}": 1.0, "reward/trained": 0.5}) + '\n{"torn')
    byte_tokenizer(EVIL, long, folder=run_dir / "policy")
    tokens = [*b"4+5:", 256, 257, 10]
    record_tokens(run_dir, [tokens], step=3, objective=EVIL, sample_ids=[EVIL], finish_reasons=[EVIL])
    log_rollouts(run_dir, 1, [{"sample_id": EVIL, "answer": EVIL, "extracted": long, "error": EVIL}])


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_hostile_text_shows_as_text_and_does_nothing(
    viewport: dict[str, int],
    run_dir: Path,
    byte_tokenizer: Callable[..., Path],
    record_tokens: Callable[..., Path],
    log_rollouts: Callable[..., None],
    open_page: Callable[..., Opened],
) -> None:
    make_hostile(run_dir, byte_tokenizer, record_tokens, log_rollouts)
    opened = open_page(page_of(run_dir), viewport=viewport)
    page = opened.page
    for tab in TABS:
        opened.show(tab)
        assert opened.overflow() <= 0
    page.select_option("[data-filter=step]", "3")
    page.locator(".text [data-i='1']").hover()
    shown = page.locator(".text").inner_text()
    assert "<script>window.ran = 1; alert(1)</script>" in shown and "␛[31m⟨RLO⟩gnihton" in shown
    assert "<img src=x onerror" in page.locator(".about").inner_text()
    assert opened.overflow() <= 0
    assert page.evaluate("typeof window.ran") == "undefined"
    assert opened.messages == []
    assert opened.requests == [(run_dir / "report.html").as_uri()]


def test_the_slider_chooses_the_step_of_the_bands_along_the_response(run_dir: Path, open_page: Callable[..., Opened]) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    opened = open_page(page_of(run_dir))
    opened.show("off_policy")
    page = opened.page
    charts = page.locator("#panel-off_policy .along figure")
    assert charts.count() == charts.locator("svg").count() == 4
    shown = page.locator(".along .shown-step")
    assert shown.inner_text() == str(lines[-1]["global_step"])
    page.locator(".step-choice").focus()
    for key, line in (("", lines[-1]), ("Home", lines[1]), ("ArrowRight", lines[2])):
        if key:
            page.keyboard.press(key)
        assert shown.inner_text() == str(line["global_step"])
        for chart, group, stretches in (
            ("ratio_along_place", "log_ratio", {"1": "token_1", "2–3": "tokens_2_3"}),
            ("prefix_along_share", "log_prefix_min", {"20–50%": "share_20_50", "50–100%": "share_50_100"}),
        ):
            for place, stretch in stretches.items():
                low, high = (line[f"{group}_{band}/{stretch}"] for band in ("p05", "p95"))
                bar = page.locator(f"[data-chart={chart}] [aria-label='place: {place}; low: {signed(low)}; high: {signed(high)}']")
                bar.wait_for(state="attached")
                assert bar.count() == 1
    page.locator("[data-chart=ratio_along_place] .plot").hover(position={"x": 80, "y": 60})
    low, middle, high = (lines[2][f"log_ratio_{band}/token_1"] for band in ("p05", "p50", "p95"))
    assert page.locator("#tip .number").all_inner_texts() == ["1", *(f"{signed(x)} (ratio {np.exp(x):.4g})" for x in (high, middle, low))]
    assert opened.messages == []


def test_a_slider_that_moves_while_a_chart_is_drawn_is_followed(run_dir: Path, open_page: Callable[..., Opened]) -> None:
    line = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[1])
    opened = open_page(page_of(run_dir))
    page = opened.page
    page.evaluate("""() => {
      const draw = vegaEmbed;
      window.vegaEmbed = async (place, ...rest) => {
        const drawn = await draw(place, ...rest);
        if (place.closest("[data-chart=prefix_along_place]")) {  // the last one
          const slider = document.querySelector(".step-choice");
          slider.value = 0;
          slider.dispatchEvent(new Event("input"));
        }
        return drawn;
      };
    }""")
    opened.show("off_policy")
    assert page.locator(".along .shown-step").inner_text() == str(line["global_step"])
    low, high = (signed(line[f"log_prefix_min_{band}/token_1"]) for band in ("p05", "p95"))
    page.locator(f"[data-chart=prefix_along_place] [aria-label='place: 1; low: {low}; high: {high}']").wait_for(state="attached")
    assert page.locator(".step-choice").get_attribute("autocomplete") == "off", "a browser that loads the page again would keep the place"
    assert opened.messages == []


def signed(value: float) -> str:
    """With the minus sign that charts write."""
    return f"{value:.6g}".replace("-", "−")


def test_on_a_phone_nothing_is_wider_than_the_window(run_dir: Path, open_page: Callable[..., Opened]) -> None:
    opened = open_page(page_of(run_dir), viewport=PHONE)
    for tab in TABS:
        opened.show(tab)
        assert opened.overflow() <= 0
        assert all(box["width"] <= PHONE["width"] for box in map(box_of, opened.page.locator(f"#panel-{tab} .card").all()))


def box_of(locator: Any) -> dict[str, float]:
    return locator.bounding_box() or {"width": 0.0}


def test_several_runs_open_with_their_curves_laid_over_each_other(
    run_dir: Path, write_run: Callable[..., Path], open_page: Callable[..., Opened]
) -> None:
    others = [write_run(f"other_{seed}", f"seed={seed}", rewards=(0.2, 0.4 + seed / 20, 0.6)) for seed in (1, 2)]
    opened = open_page(page_of(run_dir, *others))
    panel = opened.page.locator("#panel-several")
    assert panel.is_visible() and not opened.page.locator("#run-choice").is_visible()
    assert panel.locator(".series").inner_text() == "small and 2 more (3 seeds)"
    lines = panel.locator("figure", has_text="Reward").locator(".plot svg path[aria-roledescription='line mark']")
    assert lines.count() == 4  # three runs and their mean
    assert "seed" in panel.locator(".settings").inner_text()
    opened.show("run")
    opened.page.select_option("#run-choice", "2")
    shown = opened.page.locator("#panel-run .run:visible")
    assert shown.count() == 1 and shown.locator(".path").inner_text() == str(others[1])
    assert opened.messages == []


def test_print_shows_all_views_with_their_charts(run_dir: Path, open_page: Callable[..., Opened]) -> None:
    opened = open_page(page_of(run_dir), scheme="dark")
    opened.page.emulate_media(media="print")
    for tab in TABS:
        opened.page.wait_for_selector(f"#panel-{tab}[data-ready]")
        assert opened.page.locator(f"#panel-{tab} h2").is_visible()
        plots = opened.page.locator(f"#panel-{tab} .plot")
        assert plots.count() == opened.page.locator(f"#panel-{tab} .plot svg").count() > 0
    assert not opened.page.locator("[role=tablist]").is_visible()
    ink = opened.page.evaluate("getComputedStyle(document.body).color")
    assert max(map(int, ink[4:-1].split(","))) < 64  # dark on white, whatever the screen's scheme
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.messages == []


def test_a_folder_with_nothing_but_metrics_says_what_is_missing(tmp_path: Path, open_page: Callable[..., Opened]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 0, "reward/trained": 0.5}\n{"global_st')
    opened = open_page(page_of(tmp_path))
    said = opened.page.locator("#panel-run").inner_text()
    assert "no versions.jsonl tells what this run ran with" in said
    for line in ("config.yaml: missing; settings are not known", "metrics.jsonl:2: the last line is unfinished", "policy/entropy: not in"):
        assert line in said
    for tab in TABS:
        opened.show(tab)
    assert "log_ratio_p50/... and log_prefix_min_p50/...: not in" in opened.page.locator("#panel-off_policy .along").inner_text()
    assert "tokens/: no token was recorded" in opened.page.locator("#panel-tokens").inner_text()
    assert opened.messages == []
