"""Python API of Tandem, which the commands use as well."""
