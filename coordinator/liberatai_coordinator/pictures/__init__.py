"""Reports and heat maps."""
