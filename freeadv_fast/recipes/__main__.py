"""Lists the recipes: python -m freeadv_fast.recipes."""

from freeadv_fast.recipes.catalogue import RECIPES

if __name__ == "__main__":
    print("\n".join(RECIPES))
