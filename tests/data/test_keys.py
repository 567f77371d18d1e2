"""What samples are called in every run."""

from __future__ import annotations

from learndrop_ext.data.keys import describe, tells_apart


def test_describe_is_the_same_in_the_next_run() -> None:
    class Pictures:
        def __init__(self) -> None:
            self.transform = object()

    first, second = describe(Pictures()), describe(Pictures())
    assert first == second
    assert first.startswith(f"{__name__}.")
    assert "transform=<object object>" in first


def test_describe_has_the_fingerprint_of_a_hugging_face_dataset() -> None:
    class Arrow:
        def __init__(self, fingerprint: str) -> None:
            self._fingerprint = fingerprint

        def __repr__(self) -> str:
            return "Dataset({ features: ['image', 'label'], num_rows: 160 })"

    assert tells_apart(Arrow("a"))
    assert describe(Arrow("a")) == describe(Arrow("a")) != describe(Arrow("b"))
