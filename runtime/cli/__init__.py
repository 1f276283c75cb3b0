"""The verbs that need no training. The entry point, `train.cli.app`, adds the others."""
