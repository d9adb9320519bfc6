"""Networks that explain themselves, and small reference networks."""
