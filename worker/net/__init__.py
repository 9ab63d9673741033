"""Download of inputs: address checks, connections, files."""
