"""The command line: prints what the other rooms return."""
