"""Benchmarks: speed and exactness of an adapter, compared with other methods."""
