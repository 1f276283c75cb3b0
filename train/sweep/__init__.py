"""Sweeps: many fits on one corpus, and which of their settings is best. Needs the sweep extra."""
