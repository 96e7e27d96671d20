"""configs/README.md is what the fields say, and every field says something."""

from __future__ import annotations

from megatron_minpro.config import RunConfig, reference


def test_the_settings_reference_is_current() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.render(), "stale: make docs"


def test_every_setting_has_a_description_and_a_row() -> None:
    page = reference.render()
    for dotted, section in reference._sections(RunConfig, ""):
        for name, field in section.model_fields.items():
            assert field.description, f"{dotted}.{name}"
            assert f"| `{f'{dotted}.' if dotted else ''}{name}` |" in page


def test_rows_by_hand() -> None:
    page = reference.render()
    assert "| `rollout.max_retries` | integer >= 0 | `3` | resume | further attempts after a failed request |" in page
    assert "| `actor.optimizer.betas` | list |  |  | decay of the first and second moment |" in page
    assert "| `schedule` | `overlapped`, `serial` or null | `null` | resume |" in page
