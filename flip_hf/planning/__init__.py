"""Planning: the memory, time and traffic that a run would need on other hardware."""
