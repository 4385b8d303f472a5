"""How the work is spread: Ray Data, actor pools and Ray Train. Its oracle: the result equals the direct ``csm`` call, row by row."""
