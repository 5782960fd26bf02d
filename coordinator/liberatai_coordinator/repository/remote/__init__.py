"""Other repositories: any registry that speaks OCI distribution 1.1."""
