"""Tests, one file a module; helpers beside them."""
