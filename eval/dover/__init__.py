"""DOVER, the network of DoverVQA, in torch."""
