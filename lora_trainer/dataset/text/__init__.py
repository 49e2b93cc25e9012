"""Rows of conversations: read, written by a template, encoded, checked."""
