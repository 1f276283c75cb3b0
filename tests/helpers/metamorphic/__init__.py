"""Random changes to a model, and answers compared after them."""
