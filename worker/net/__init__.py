"""Addresses, connections and downloads."""
