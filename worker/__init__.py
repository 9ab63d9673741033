"""The worker: settings, jobs, server parts and network parts behind the five modules at the root."""
