"""What exit heads learn from: hidden states of the base on its own answers."""
