"""nissl: which explanations of a network can be believed, with the evidence."""

__version__ = "0.1.0"
