"""Thin adapters to other projects, a module each. Nothing in openm3 imports them; they import their project late."""
