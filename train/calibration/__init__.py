"""Exit temperatures and traces, from text that the heads have not seen."""
