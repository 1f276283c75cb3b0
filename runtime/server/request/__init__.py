"""What clients may ask: bodies, what of them says nothing, prompts, limits."""
