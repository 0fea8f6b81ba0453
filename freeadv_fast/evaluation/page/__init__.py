"""A run, or several, as one HTML file that a person reads: no network, no scripts."""

from freeadv_fast.evaluation.page.comparison import write_comparison
from freeadv_fast.evaluation.page.run import refresh_page, write_page

__all__ = ["refresh_page", "write_comparison", "write_page"]
