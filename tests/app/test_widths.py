from __future__ import annotations

import pytest

from learndrop_ext.app.widths import NarrowSpec, parse_narrow


def test_parse_narrow() -> None:
    assert parse_narrow("l1:0.5") == NarrowSpec("l1", 0.5)
    assert parse_narrow("coreset:1") == NarrowSpec("coreset", 1.0)


@pytest.mark.parametrize("text", ["l1", "l1:", "l1:0", "l1:1.5", "l1:nan", "l3:0.5", ":0.5", "l1:half", ""])
def test_parse_narrow_refuses_other_forms(text: str) -> None:
    with pytest.raises(ValueError, match=r"--narrow must be CRITERION:KEEP with one of l1, l2, .* at most 1, got"):
        parse_narrow(text)
