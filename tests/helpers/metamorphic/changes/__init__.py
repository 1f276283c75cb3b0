"""Ways to change a model around SpecBound. A change is a small function of a `Subject`; the table has all of them."""

from tests.helpers.metamorphic.changes import adapters, hooks, lives, modules, numbers, settings, weights

TABLES = (weights, adapters, hooks, modules, numbers, settings, lives)
CHANGES = {change.__name__: change for table in TABLES for change in table.CHANGES}
