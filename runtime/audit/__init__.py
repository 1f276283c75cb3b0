"""The audit: whether what SpecBound generates is what the base generates, on prompts of the user's choice."""
