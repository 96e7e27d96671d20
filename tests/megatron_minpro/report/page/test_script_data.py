from __future__ import annotations

import json

import pytest

from megatron_minpro.report.page.script_data import script_json


def test_no_text_can_end_the_script_and_the_value_stays_the_same() -> None:
    value = {"text": "</script><script>alert(1)</script><!-- & \u2028\u2029", "list": [1, None, "é"]}
    text = script_json(value)
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == value


def test_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json({"value": float("nan")})
