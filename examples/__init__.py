"""Programs to try the worker with; not part of it."""
