"""The commands of fitting on the `specbound` command line."""
