"""Measurements that are run by hand; nothing of the worker imports them."""
