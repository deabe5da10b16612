"""The embedded demo model: its grammar of fables, the recipe that trains it, and the measurements."""
