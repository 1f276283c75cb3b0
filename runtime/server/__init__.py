"""An OpenAI-compatible server over one model; needs the `serve` extra, and nothing else in `runtime` imports it."""
