"""Prompts, and the base model's own answers to them."""
