"""Environment variables by which the launcher speaks to the processes below it."""

# Set for everything below `rocm-patch run`: the environment has been planned for the whole tree.
LAUNCHED = "_ROCM_PATCH_LAUNCHED"
