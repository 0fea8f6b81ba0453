"""Lists the recipes with their papers' numbers: python -m freeadv_fast.recipes [--show NAME]."""

import sys

from freeadv_fast.cli import run_tool
from freeadv_fast.recipes.listing import recipe_page, recipe_tables


def main(show: str | None = None) -> int:
    """Prints all recipes by paper, or one of them whole.

    Args:
        show: Name of a recipe to print whole, as a config.yaml.
    """
    print(recipe_page(show) if show else recipe_tables())
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
