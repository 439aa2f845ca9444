"""What a recipe says about data: mistakes are found before anything is read."""

from pathlib import Path

import pytest

from foveal.train.data import DataSettings
from foveal.train.recipe import explain, read_recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("held_out = 0.1", r"no data: expected \[\[data\.text\]\]"),
        ("[[text]]\nfiles = []", r"text\.0: files = \[\]"),
        ("[[text]]\nfiles = ['a']\nseparator = ''", "separator = ''"),
        ("[[text]]\nfiles = ['a']\nweight = 0", r"text\.0\.weight = 0\.0: expected > 0"),
        ("[[text]]\nfiles = ['a']\nname = 'x'\n[[retrieval]]\nname = 'x'", "several sources have one name: x, x"),
        ("[[retrieval]]\nhaystack = 'books'", "haystack = 'books': no text source"),
        ("[[retrieval]]\ntasks = ['copi']", r"tasks\.0 = 'copi': .*did you mean copy"),
        ("[[retrieval]]\nanswer_weight = 0\nother_weight = 0", "nothing would be learnt"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    """One line each, before any file is opened."""
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "a.toml", DataSettings)


def test_sources_are_named_by_kind_and_number(tmp_path: Path) -> None:
    """Logs need a name for each."""
    (tmp_path / "a.toml").write_text("[[text]]\nfiles=['a']\n[[text]]\nfiles=['b']\nname='b'\n[[retrieval]]")
    settings = read_recipe(tmp_path / "a.toml", DataSettings)
    assert settings.names == ("text0", "b", "retrieval0")


def test_every_key_is_explained() -> None:
    """`foveal train --explain` is the documentation of data."""
    text = explain(DataSettings)
    for name in ("vocab_size", "files", "weight", "haystack", "answer_weight", "held_out", "cache"):
        assert f"\n{name} = " in f"\n{text}" or f"\n# {name} = " in text
