"""What agents learn: a module a task, and one registry."""
