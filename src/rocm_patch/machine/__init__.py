"""What this computer is: its GPUs, the installed torch build, and the environment they need. No torch needed."""
