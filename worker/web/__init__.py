"""The page to try the worker on, its uploads, and the OpenAPI document."""
