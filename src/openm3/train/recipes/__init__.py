"""Whole training runs as readable files, one folder a model."""
