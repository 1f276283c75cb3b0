"""What a policy would do on logged text and how fast: costs, replay, tuning."""
