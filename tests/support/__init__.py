"""Fakes of the far side, synthetic media and tiny networks for the tests."""
