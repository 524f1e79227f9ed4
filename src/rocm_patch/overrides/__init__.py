"""All that rocm-patch changes in PyTorch. Every change goes through the ledger."""
