"""Speed and exactness of an adapter on prompts, beside other methods."""
