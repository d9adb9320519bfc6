"""nissl side by side with its peers: the same network, the same inputs, one process, results compared before times."""
