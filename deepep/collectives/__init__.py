"""Sums of gradients over the ranks: number formats on the wire, and schedules that move them."""
