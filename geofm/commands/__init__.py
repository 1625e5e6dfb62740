"""Commands of ``geofm``, beside those of Lightning: each a function whose signature is its usage."""
