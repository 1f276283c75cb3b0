"""The round: draft with the shallow layers, verify with the deep ones, accept, crop."""
