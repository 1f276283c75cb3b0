"""From what the worker tells of an answer to the bodies and streams that clients read."""
