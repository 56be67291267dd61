"""Which adapter an id stands for, now and after a restart."""
