"""What the rehearsal needs before torch: a torch whose internals are known, and g++."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.rehearsal import device_guard


@pytest.mark.parametrize("version", ["2.12.1", "2.14.1+cpu"])
def test_an_unknown_torch_is_named_with_the_versions_that_were_seen(version: str) -> None:
    with pytest.raises(ValueError, match=rf"torch {version.replace('+', '.')}: .*seen in 2\.13\.0 only"):
        device_guard.check_torch(version)


def test_a_known_torch_of_any_build_passes() -> None:
    device_guard.check_torch("2.13.0")
    device_guard.check_torch("2.13.0+cpu")


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^g\+\+ is not on PATH: .*install g\+\+"):
        device_guard.build("2.13.0")


def test_a_guard_that_does_not_compile_is_named_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "broken.cpp"
    source.write_text("not C++\n")
    monkeypatch.setattr(device_guard, "SOURCE", source)
    with pytest.raises(ValueError, match=r"does not compile broken\.cpp against torch 2\.13\.0: .*error"):
        device_guard.build("2.13.0")
    assert not list((tmp_path / "cache").rglob("*.so"))
