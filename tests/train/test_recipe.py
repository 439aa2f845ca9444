"""Recipes: every mistake is one line that names file, key and value."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from foveal.train.recipe import explain, key, read_recipe


@dataclass(frozen=True)
class Optimiser:
    name: Literal["adamw", "muon"] = key("which one", "adamw")
    rate: float = key("learning rate", 1e-3, above=0)
    betas: tuple[float, ...] = key("averages", (0.9, 0.95), at_least=0, below=1)


@dataclass(frozen=True)
class Source:
    files: tuple[Path, ...] = key("where")
    weight: float = key("share", 1.0, above=0)


@dataclass(frozen=True)
class Recipe:
    steps: int = key("how long", at_least=1)
    title: str | None = key("what to call it", None)
    quick: bool = key("for a try", False)
    optimiser: Optimiser = key("how to learn", Optimiser)
    sources: tuple[Source, ...] = key("text", ())

    def __post_init__(self) -> None:
        if self.steps == 13:
            raise ValueError("steps = 13: bad luck")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A whole recipe."""
    file = tmp_path / "recipe.toml"
    file.write_text(
        'steps = 5\n[optimiser]\nrate = 1\n[[sources]]\nfiles = ["a.txt", "/b"]\n[[sources]]\nfiles = ["c"]'
    )
    return file


def test_a_recipe_becomes_dataclasses(path: Path) -> None:
    """Whole numbers do for floats, relative paths start at the recipe, absent keys have their defaults."""
    recipe = read_recipe(path, Recipe)
    assert recipe == Recipe(
        steps=5,
        optimiser=Optimiser(rate=1.0),
        sources=(Source((path.parent / "a.txt", Path("/b"))), Source((path.parent / "c",))),
    )
    assert type(recipe.optimiser.rate) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stops = 3", r"unknown key stops = 3 \(did you mean steps\?\)"),
        ("steps = 3\noptimiser.rat = 1.0", r"unknown key optimiser\.rat = 1\.0 \(did you mean rate\?\)"),
        ("quick = true", r"steps is missing \(a whole number: how long\)"),
        ("steps = 1.5", r"steps = 1\.5: expected a whole number"),
        ("steps = true", r"steps = True: expected a whole number"),
        ("steps = 0", r"steps = 0: expected >= 1"),
        ("steps = 13", r"steps = 13: bad luck"),
        ("steps = 3\noptimiser.rate = nan", r"optimiser\.rate = nan: expected > 0"),
        ("steps = 3\noptimiser.betas = [0.9, 1.0]", r"optimiser\.betas\.1 = 1\.0: expected >= 0, < 1"),
        ("steps = 3\noptimiser.betas = 0.9", r"optimiser\.betas = 0\.9: expected a list, each a number"),
        ("steps = 3\noptimiser.name = 'adam'", r"optimiser\.name = 'adam': .*'adamw', 'muon' \(did you mean adamw\?\)"),
        ("steps = 3\noptimiser = 1", r"optimiser = 1: expected a table"),
        ("steps = 3\n[[sources]]\nfiles = []\n[[sources]]\nweight = 2", r"sources\.1\.files is missing"),
        ("steps = 3\n[sources]\nfiles = []", r"sources = .*: expected a list, each a table"),
        ("steps = 3\nsteps", r"Expected '='"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    """Nothing is ignored, and nothing starts with a value that cannot be meant."""
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(file, Recipe)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_overrides_come_after_the_file(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TOML values, strings without quotes, places in lists; paths start where the user is."""
    monkeypatch.chdir(tmp_path / "..")
    given = ["steps=7", "optimiser.name=muon", "sources.1.weight = 3", "title=a b", "sources.0.files=['x']"]
    recipe = read_recipe(path, Recipe, given)
    assert (recipe.steps, recipe.optimiser.name, recipe.sources[1].weight, recipe.title) == (7, "muon", 3.0, "a b")
    assert recipe.sources[0].files == (Path.cwd() / "x",)


def test_paths_may_name_the_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that is shared keeps its data elsewhere; a variable that is not set is a mistake, not a folder."""
    monkeypatch.setenv("SOME_TEXT", "/texts")
    monkeypatch.setenv("HOME", "/home/me")
    path.write_text('steps = 1\n[[sources]]\nfiles = ["$SOME_TEXT/a", "~/b", "${SOME_TEXT}/c"]')
    assert read_recipe(path, Recipe).sources[0].files == (Path("/texts/a"), Path("/home/me/b"), Path("/texts/c"))
    monkeypatch.delenv("SOME_TEXT")
    with pytest.raises(ValueError, match=r"sources\.0\.files\.0 = '\$SOME_TEXT/a': the environment has no \$SOME_TEXT"):
        read_recipe(path, Recipe)
    with pytest.raises(ValueError, match=r"override .*has no \$SOME_TEXT"):
        read_recipe(path, Recipe, ["sources.0.files=['$SOME_TEXT/x']"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "expected key=value"),
        ("sources.2.weight=1", "'2' is not one of 2 entries"),
        ("steps.more=1", "steps is no table"),
        ("optimiser.speed=1", "unknown key optimiser.speed"),
        ("steps=many", "steps = 'many': expected a whole number"),
    ],
)
def test_wrong_overrides_are_named(path: Path, override: str, message: str) -> None:
    """A mistyped override must not train another model."""
    with pytest.raises(ValueError, match=message):
        read_recipe(path, Recipe, [override])


def test_explain_tells_every_key() -> None:
    """Type, range, default and meaning, as a recipe would have them."""
    text = explain(Recipe)
    for part in (
        "# how long (a whole number; >= 1)\nsteps = ...  # must be given",
        "[optimiser]  # how to learn",
        "# which one (one of 'adamw', 'muon')\nname = \"adamw\"",
        "# averages (a list, each a number; >= 0, < 1)\nbetas = [0.9, 0.95]",
        "[[sources]]  # text (any number of these)",
        "# title = ...\n",
        "quick = false",
    ):
        assert part in text


def test_what_explain_tells_is_a_recipe(tmp_path: Path) -> None:
    """With values for the keys that must be given, its text is a recipe of all defaults."""
    (tmp_path / "a.toml").write_text(
        explain(Recipe).replace("steps = ...", "steps = 1").replace("files = ...", "files = []")
    )
    assert read_recipe(tmp_path / "a.toml", Recipe) == Recipe(steps=1, sources=(Source(()),))
