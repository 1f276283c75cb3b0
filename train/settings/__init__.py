"""The settings of a fit: the recipe file and the flags."""
