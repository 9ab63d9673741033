"""Fakes of servers, synthetic media and tiny networks for the tests."""
