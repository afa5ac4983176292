"""OpenAPI document of the gateway, a module for each API."""
