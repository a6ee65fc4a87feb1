"""Times of dispatch and combine on a cluster that is described by a few rates, from counted bytes."""
