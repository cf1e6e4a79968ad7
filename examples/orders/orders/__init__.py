"""A small shop: the application that the README, the tests and the drills run."""
