"""Ingest a model, hold it as a program, plan its steps."""
