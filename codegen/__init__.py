"""From fused nodes to kernel launches to Triton source."""
