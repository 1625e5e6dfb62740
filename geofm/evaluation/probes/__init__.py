"""Probes of features: k-NN, linear heads, logistic regression and decoders."""
