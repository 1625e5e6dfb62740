"""Commands of ``geofm``. Their command lines are generated from the signatures of functions."""
