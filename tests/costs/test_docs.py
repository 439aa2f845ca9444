"""docs/costs.md says what the tool says."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_page_is_up_to_date() -> None:
    """A figure of the page that the tool no longer gives: run docs/build_costs.py."""
    spec = importlib.util.spec_from_file_location("build_costs", DOCS / "build_costs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "costs.md").read_text(encoding="utf-8") == module.page()
    for name in ("costs-deepseek-v3.2", "costs-models"):
        assert (DOCS / "images" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
