"""bench: speed as a ratio against a named baseline, both measured in one run on this machine. One file for each benchmark."""
