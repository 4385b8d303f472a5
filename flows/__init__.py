"""What a user runs: the command line, configurations, workspaces, tracking and the report."""
