"""The model repository: signed commits with parents, in an OCI image layout that other programs can read."""
