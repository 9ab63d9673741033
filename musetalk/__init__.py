"""The MuseTalk model: pictures and sound in, pictures out. Knows nothing of jobs, HTTP, queues or the environment."""

__version__ = "0.1.0"
