"""What the tests of our own kernels share."""
