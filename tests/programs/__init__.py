"""What runs in other processes than the tests that start it."""
