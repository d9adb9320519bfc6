"""Spikes: filters, communities, bi-clusters and generative models of populations of neurons."""
