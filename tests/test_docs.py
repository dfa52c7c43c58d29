"""What the pages point at is there, and their lines fit the screen."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in targets if not (page.parent / link).exists()] == []


def test_recipes_name_pages_that_exist() -> None:
    recipes = sorted((ROOT / "src/cavelight/recipes").glob("*.toml"))
    named = [page for recipe in recipes for page in re.findall(r"docs/\w+\.md", recipe.read_text(encoding="utf-8"))]
    assert named and all((ROOT / page).is_file() for page in named)


def test_the_recipe_page_lists_every_key_and_its_default() -> None:
    from cavelight.spec.recipe import Recipe

    text = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    for section, keys in Recipe().model_dump().items():
        for key, default in keys.items():
            found = re.search(rf"^(?:# )?{key} = (\S+)", text, re.MULTILINE)
            assert found, f"{section}.{key}"
            if isinstance(default, bool):
                assert found[1] == str(default).lower()
            elif isinstance(default, (int, float)):
                assert float(found[1]) == default, f"{section}.{key}"
