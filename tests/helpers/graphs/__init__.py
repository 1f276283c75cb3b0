"""What tests of graphs share: models whose layers run as segments, and CUDA graphs without a GPU."""
