"""What the command line does beyond running programs; each tool returns a record, and prints nothing."""
