"""The kernel J Jᵀ."""
