"""What lies on disk: an adapter's config, its folder, its place on the Hub, and whose base it fits."""
