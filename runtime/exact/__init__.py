"""How a block of tokens is computed with the bits of one-token decoding, and the proof that it is."""
