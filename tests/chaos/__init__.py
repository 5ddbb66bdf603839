"""A federation of real processes that are killed, stopped and cut off while it runs (`make chaos`)."""
