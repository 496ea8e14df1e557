from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_cli.errors import SecurityError
from pocl_cli.paths import confined, slugify


@given(st.text(max_size=120))
def test_slugify_of_any_text_then_is_a_short_harmless_name_that_it_keeps(text: str) -> None:
    slug = slugify(text)

    assert re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,58}[a-z0-9])?", slug)
    assert ".." not in slug
    assert slugify(slug) == slug


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("openai-community/GPT2 (1.5B)", "openai-community-gpt2-1.5b"),
        ("../../etc/passwd", "etc-passwd"),
        ("a\0b\nc", "a-b-c"),
        ("Élan", "elan"),
        ("日本", "unnamed"),
        ("..", "unnamed"),
        ("", "unnamed"),
    ],
)
def test_slugify_when_given_a_name_then_stays_readable(text: str, slug: str) -> None:
    assert slugify(text) == slug


@pytest.mark.parametrize("name", ["", "/etc", "..", "a/../b", "./a", "a//b", "a/", "a\0", "a\n", "a\\b", "\x1b[31m"])
def test_confined_when_a_name_leads_elsewhere_then_is_refused(name: str) -> None:
    with pytest.raises(SecurityError) as caught:
        confined(Path("outputs"), name)
    assert caught.value.exit_code == 9


@pytest.mark.parametrize("name", ["a", "a/b.json", ".hidden", "a b", "é", "..a"])
def test_confined_when_a_name_is_plain_then_is_below_the_folder(name: str) -> None:
    assert confined(Path("outputs"), name) == Path("outputs", *name.split("/"))
