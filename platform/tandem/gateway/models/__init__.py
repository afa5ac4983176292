"""Names of models: the catalog, and the registry behind it."""
