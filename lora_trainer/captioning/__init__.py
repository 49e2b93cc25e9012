"""Captions by machine: captioners behind one interface, and what is done to their words before they are written."""
