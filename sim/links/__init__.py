"""Links between ranks that stand in for a cluster's: a wire without a NIC."""
