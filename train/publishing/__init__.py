"""From fitted heads to an adapter's folder and on to the Hub."""
