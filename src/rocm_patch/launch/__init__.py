"""Starting a program patched, with nothing to edit in it: `rocm-patch run`, `activate`, and the hook they use."""
