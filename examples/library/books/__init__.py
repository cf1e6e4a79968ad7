"""The library's books."""
